// Lists of any kind, as the API server prints them, updated by watch.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks'
import { findKind, kindKey, kinds, linkOf, may, pathOf, session, useList, useTable, type Column, type Kind, type Row } from './api'
import { Grid, type GridColumn } from './grid'
import { Events } from './events'
import { Badge, Empty, State, Time, go, setQuery, useNow, useTitle } from './ui'
import type { Event } from './why'

export function useNamespace(query: URLSearchParams): string {
  const chosen = query.get('ns')
  return chosen === '*' ? '' : chosen ?? session()?.namespace ?? ''
}

export function NamespacePicker({ now }: { now: string }) {
  const all = useTable('/k8s/api/v1/namespaces')
  const names = all.rows.map((r) => r.meta.name).sort()
  const choose = (v: string) => setQuery({ ns: v || '*' })
  if (all.phase === 'forbidden') {
    return <label class="field">Namespace <input value={now} placeholder="name" onChange={(e) => choose(e.currentTarget.value.trim())} /></label>
  }
  if (now && !names.includes(now)) names.unshift(now)
  return <label class="field">Namespace <select value={now} onChange={(e) => choose(e.currentTarget.value)}>
    <option value="">All namespaces</option>{names.map((n) => <option value={n}>{n}</option>)}
  </select></label>
}

/** useKind finds a kind by the words of an address. */
export function useKind(group: string, resource: string) {
  const [found, set] = useState<{ kind?: Kind; bad?: string; of: string }>({ of: '' })
  const key = `${group}/${resource}`
  useEffect(() => {
    let here = true
    findKind(group, resource).then((k) => here && set({ of: key, ...(k ? { kind: k } : { bad: `the cluster has no kind ${key}` }) }), (e: Error) => here && set({ of: key, bad: e.message }))
    return () => { here = false }
  }, [key])
  return found.of === key ? found : { of: key }
}

const widths: Record<string, string> = { Name: 'minmax(11rem,3fr)', Namespace: 'minmax(7rem,1.2fr)', Status: 'minmax(8rem,1.2fr)', Age: '5.5rem', Ready: '5.5rem', Restarts: '6rem', Node: 'minmax(8rem,1.5fr)', IP: 'minmax(8rem,1fr)' }

/** columnsOf makes columns of the server's. */
export function columnsOf(columns: Column[], k: Kind, namespaced: boolean, now: number): GridColumn<Row>[] {
  const out: GridColumn<Row>[] = []
  const wide = new Set(k.resource === 'pods' ? ['IP', 'Node'] : k.resource === 'nodes' ? ['Internal-IP', 'Container-Runtime', 'OS-Image'] : [])
  columns.forEach((c, i) => {
    if (c.priority > 0 && !wide.has(c.name)) return
    const age = c.name === 'Age' || c.name === 'Created At'
    out.push({
      name: c.name, width: widths[c.name] ?? 'minmax(6rem,1fr)',
      ...(i === 0 || c.name === 'Name' || c.name === 'Status' ? {} : { least: c.priority > 0 ? 1100 : age || c.name === 'Ready' ? 420 : 640 }),
      cell: (r) => {
        const v = r.cells[i]
        if (age) return <Time at={r.meta.creationTimestamp} now={now} />
        if (c.name === 'Status' || c.name === 'Phase') return <Badge word={String(v)} />
        if (c.name === 'Restarts') return String(v).replace(/ \(.*/, '') // the time in it is old at once
        return <span title={String(v ?? '')}>{v === null || v === undefined || v === '' || v === '<none>' ? '–' : String(v)}</span>
      },
      sort: (r) => age ? -new Date(r.meta.creationTimestamp).getTime() : typeof r.cells[i] === 'number' ? r.cells[i] as number : c.name === 'Restarts' ? parseInt(String(r.cells[i])) : String(r.cells[i] ?? ''),
    })
    if (i === 0 && namespaced) out.push({ name: 'Namespace', width: widths.Namespace!, least: 520, cell: (x) => x.meta.namespace, sort: (x) => x.meta.namespace ?? '' })
  })
  return out
}

/** match reports whether a row has all words of a search; -word wants it not to be there. */
function match(row: Row, words: string[]) { return words.every((w) => w.startsWith('-') && w.length > 1 ? !row.text.includes(w.slice(1)) : row.text.includes(w)) }

export function ListPage({ group, resource, query }: { group: string; resource: string; query: URLSearchParams }) {
  const { kind, bad } = useKind(group, resource)
  const namespace = useNamespace(query)
  const now = useNow()
  const table = useTable(kind ? pathOf(kind, namespace) : null)
  const search = query.get('q') ?? ''
  const input = useRef<HTMLInputElement>(null)
  useTitle(kind ? plural(kind) : resource)
  useEffect(() => {
    const on = (e: KeyboardEvent) => {
      if (e.key === '/' && !/^(INPUT|TEXTAREA|SELECT)$/.test((e.target as HTMLElement).tagName)) { e.preventDefault(); input.current?.focus() }
    }
    addEventListener('keydown', on)
    return () => removeEventListener('keydown', on)
  }, [])
  const words = search.toLowerCase().split(/\s+/).filter(Boolean)
  const rows = useMemo(() => words.length ? table.rows.filter((r) => match(r, words)) : table.rows, [table.rows, search])
  const columns = kind ? columnsOf(table.columns, kind, kind.namespaced && !namespace, now) : []
  if (bad) return <main><State live={{ phase: 'error', message: bad }} what={resource} now={now} /></main>
  return <main class="fill">
    <header class="bar">
      <h1>{kind ? plural(kind) : resource}</h1>
      <span class="count" role="status">{table.phase === 'loading' ? '' : words.length ? `${rows.length} of ${table.rows.length}` : `${table.rows.length}`}</span>
      {kind?.namespaced && <NamespacePicker now={namespace} />}
      <label class="field search">Search <input ref={input} type="search" value={search} placeholder="name, label=value, -not" aria-keyshortcuts="/" onInput={(e) => setQuery({ q: e.currentTarget.value })} /></label>
    </header>
    <State live={table} what={kind ? plural(kind).toLowerCase() : resource} now={now} />
    {kind && table.phase === 'live' && !rows.length && <Empty>{table.rows.length ? 'Nothing matches the search.' : `There are no ${plural(kind).toLowerCase()}${namespace ? ` in the namespace ${namespace}` : ''}.`}</Empty>}
    {kind && rows.length > 0 && <Grid label={plural(kind)} columns={columns} rows={rows} id={(r) => r.meta.uid} link={(r) => linkOf(kind, r.meta.namespace, r.meta.name)}
      sorted={query.get('sort') ?? 'Name'} onSort={(s) => setQuery({ sort: s === 'Name' ? '' : s })} />}
  </main>
}

export function plural(k: Kind): string {
  const name = k.kind
  if (k.kind === 'CustomResourceDefinition') return 'CRDs'
  return k.kind === 'Ingress' ? 'Ingresses' : /(s|x|ch)$/.test(name) ? (name.endsWith('s') && !name.endsWith('ss') ? name : name + 'es') : name.endsWith('y') ? name.slice(0, -1) + 'ies' : name + 's'
}

/** AllKinds lists everything that the cluster has, those of CRDs too. */
export function AllKinds({ query }: { query: URLSearchParams }) {
  useTitle('All kinds')
  const [all, set] = useState<Kind[] | null>(null), [bad, setBad] = useState('')
  const [allowed, setAllowed] = useState<Set<string>>(new Set())
  const namespace = useNamespace(query)
  useEffect(() => { kinds(true).then(set, (e: Error) => setBad(e.message)) }, [])
  useEffect(() => {
    let here = true
    for (const k of all ?? []) void may({ verb: 'list', group: k.group, resource: k.resource, ...(k.namespaced && namespace ? { namespace } : {}) }).then((y) => y && here && setAllowed((s) => new Set(s).add(kindKey(k))))
    return () => { here = false }
  }, [all, namespace])
  return <main>
    <header class="bar"><h1>All kinds</h1><NamespacePicker now={namespace} /></header>
    {!all && <State live={bad ? { phase: 'error', message: bad } : { phase: 'loading' }} what="the kinds of this cluster" now={Date.now()} />}
    <ul class="kinds">{(all ?? []).filter((k) => allowed.has(kindKey(k))).map((k) => <li><a href={linkOf(k)} onClick={(e) => { if (!e.ctrlKey && !e.metaKey) { e.preventDefault(); go(linkOf(k) + location.search) } }}>{plural(k)}</a> <small>{k.group || 'core'}/{k.version}</small></li>)}</ul>
  </main>
}

/** EventsPage is the events of a namespace or of the cluster, the newest first. */
export function EventsPage({ query }: { query: URLSearchParams }) {
  useTitle('Events')
  const now = useNow(), namespace = useNamespace(query), search = (query.get('q') ?? '').toLowerCase()
  const events = useList<Event>(namespace ? `/k8s/api/v1/namespaces/${namespace}/events` : '/k8s/api/v1/events')
  const warnings = query.get('type') === 'Warning'
  const items = events.items.filter((e) => (!warnings || e.type === 'Warning') && (!search || [e.reason, e.message, e.involvedObject?.kind, e.involvedObject?.namespace, e.involvedObject?.name].join(' ').toLowerCase().includes(search)))
  return <main>
    <header class="bar"><h1>Events</h1><span class="count" role="status">{events.phase === 'live' ? items.length : ''}</span><NamespacePicker now={namespace} />
      <label class="check"><input type="checkbox" checked={warnings} onChange={(e) => setQuery({ type: e.currentTarget.checked ? 'Warning' : '' })} /> Warnings only</label>
      <label class="field search">Search <input type="search" value={query.get('q') ?? ''} onInput={(e) => setQuery({ q: e.currentTarget.value })} /></label></header>
    <section class="card"><Events live={events} items={items} now={now} link /></section>
  </main>
}
