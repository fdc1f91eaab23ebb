// Lists of events.
import { known, linkOf, type Live } from './api'
import { Badge, Empty, Link, State, Time } from './ui'
import { whenOf, type Event } from './why'

export function Events({ live, items, now, link }: { live: Live; items: Event[]; now: number; link?: boolean }) {
  const sorted = [...items].sort((a, b) => whenOf(b).localeCompare(whenOf(a)))
  return <section aria-label="Events">
    <State live={live} what="the events" now={now} />
    {live.phase === 'live' && !sorted.length && <Empty>There are no events of the last hour.</Empty>}
    <ul class="plain events">{sorted.slice(0, 200).map((e) => <li key={e.metadata.uid}>
      <span><Badge word={e.reason ?? ''} tone={e.type === 'Warning' ? 'bad' : 'plain'} /> {link && e.involvedObject && <EventObject e={e} />} <span class="wrap">{e.message}</span></span>
      <small>{(e.series?.count ?? e.count ?? 1) > 1 ? `${e.series?.count ?? e.count} times, ` : ''}<Time at={whenOf(e)} now={now} /></small></li>)}</ul>
  </section>
}

function EventObject({ e }: { e: Event }) {
  const o = e.involvedObject!, group = o.apiVersion?.includes('/') ? o.apiVersion.split('/')[0]! : ''
  const k = known.find((x) => x.kind === o.kind && (o.apiVersion ? x.group === group : true))
  const text = `${o.kind} ${o.namespace ? o.namespace + '/' : ''}${o.name}`
  return k ? <Link to={k.resource === 'nodes' ? `/nodes/${o.name}` : linkOf(k, o.namespace, o.name)}>{text}</Link> : <b>{text}</b>
}
