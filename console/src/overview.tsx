// What the owner of a cluster opens first: is it running, what may still be lost, what is wrong, what changed.
import { useMemo } from 'preact/hooks'
import { linkOf, known, useList, useMay, useTable, type NodeState } from './api'
import { Events } from './events'
import { Members } from './members'
import { Badge, Empty, Link, State, Step, Time, ago, useNow, useTitle } from './ui'
import { whenOf, type Event } from './why'

export function NodeStatus({ node, now, short }: { node: NodeState; now: number; short?: boolean }) {
  const f = node.facts
  if (!f) return node.phase === 'forbidden' ? null : <State live={node} what="the state of the node" now={now} />
  const s = f.status, running = s.microk8s.running
  return <>
    {node.phase === 'stale' && <State live={node} what="the state of the node" now={now} />}
    <section class={`headline ${running ? 'good' : s.microk8s.slow ? 'wait' : 'bad'}`} aria-label="Is it running" aria-live="polite">
      <p class="big"><span aria-hidden="true">{running ? '●' : s.microk8s.slow ? '◐' : '▲'} </span>{f.headline}</p>
      <p>{f.tolerates ? `${f.tolerates[0]!.toUpperCase()}${f.tolerates.slice(1)}.` : s['high-availability'].endpoints?.length ? `The datastore is an external etcd: ${s['high-availability'].endpoints.join(', ')}.` : f.members?.length === 1 ? 'One control-plane node: if it is lost, the cluster is.' : ''} <small>Node {f.node}, MicroK8s {f.version}</small></p>
    </section>
    {!short && <section class="card" aria-label="Problems"><h2>Problems <small>{s.problems?.length ?? 0}</small></h2>
      {!s.problems?.length && <Empty>Nothing is wrong with this node, as far as could be looked.</Empty>}
      <ul class="plain problems">{(s.problems ?? []).map((p) => <li key={p.id + p.what}><div><p><span class="badge bad"><span aria-hidden="true">▲ </span>problem</span> {p.what}</p>{p.do && <p><Step text={p.do} /></p>}<small>{p.id}: from {p['looked-at']}</small></div></li>)}</ul>
      {!!s['not-looked-at']?.length && <><h3>Not looked at</h3><ul class="plain">{s['not-looked-at'].map((u) => <li><span>{u['looked-at']} <small>({u.id})</small>: {u.why}</span></li>)}</ul></>}
    </section>}
  </>
}

export function Overview({ node }: { node: NodeState }) {
  useTitle('Overview')
  const now = useNow(5000)
  const mayNodes = useMay({ verb: 'list', resource: 'nodes' }), mayEvents = useMay({ verb: 'list', resource: 'events' }), mayDeploy = useMay({ verb: 'list', group: 'apps', resource: 'deployments' })
  const nodes = useTable(mayNodes ? '/k8s/api/v1/nodes' : null)
  const deployments = useTable(mayDeploy ? '/k8s/apis/apps/v1/deployments' : null)
  const events = useList<Event>(mayEvents ? '/k8s/api/v1/events' : null)
  const hour = now - 3600000
  const recent = useMemo(() => events.items.filter((e) => new Date(whenOf(e)).getTime() > hour), [events.items, Math.floor(hour / 60000)])
  const column = (t: typeof nodes, name: string) => t.columns.findIndex((c) => c.name === name)
  const unready = deployments.rows.filter((r) => { const m = /^(\d+)\/(\d+)$/.exec(String(r.cells[column(deployments, 'Ready')])); return m && m[1] !== m[2] })
  const changes = [
    ...node.changes,
    ...nodes.rows.filter((r) => new Date(r.meta.creationTimestamp).getTime() > hour).map((r) => ({ when: new Date(r.meta.creationTimestamp).getTime(), what: `node ${r.meta.name} joined` })),
    ...(node.facts?.services ?? []).filter((s) => s.since && new Date(s.since).getTime() > hour).map((s) => ({ when: new Date(s.since!).getTime(), what: `service ${s.name} on ${node.facts!.node}: ${s.phase}` })),
  ].sort((a, b) => b.when - a.when)
  return <main>
    <h1 class="hide">Overview</h1>
    <NodeStatus node={node} now={now} />
    <div class="columns">
      {mayNodes && <section class="card"><h2><Link to="/nodes">Nodes</Link> <small>{nodes.phase === 'live' ? nodes.rows.length : ''}</small></h2>
        <State live={nodes} what="the nodes" now={now} />
        <ul class="plain">{nodes.rows.slice(0, 12).map((r) => <li key={r.meta.uid}><span><Link to={`/nodes/${r.meta.name}`}>{r.meta.name}</Link> <Badge word={String(r.cells[column(nodes, 'Status')])} /></span><small>{String(r.cells[column(nodes, 'Roles')]).replace('<none>', '')} {String(r.cells[column(nodes, 'Version')])}, {ago(r.meta.creationTimestamp, now)}</small></li>)}</ul>
        {nodes.rows.length > 12 && <p><Link to="/nodes">and {nodes.rows.length - 12} more</Link></p>}
      </section>}
      {node.facts?.members && <section class="card"><h2><Link to="/nodes">Datastore</Link></h2><Members members={node.facts.members} small /></section>}
      {mayDeploy && <section class="card"><h2><Link to={linkOf(known[0]!)}>Deployments</Link> <small>{deployments.phase === 'live' ? deployments.rows.length : ''}</small></h2>
        <State live={deployments} what="the deployments" now={now} />
        {deployments.phase === 'live' && !unready.length && <Empty>All have as many pods as they want.</Empty>}
        <ul class="plain">{unready.slice(0, 10).map((r) => <li key={r.meta.uid}><span><Badge word={`${r.cells[column(deployments, 'Ready')]} ready`} tone="wait" /> <Link to={linkOf(known[0]!, r.meta.namespace, r.meta.name)}>{r.meta.namespace}/{r.meta.name}</Link></span></li>)}</ul></section>}
      {node.facts && <section class="card"><h2>Addons</h2><ul class="plain">{(node.facts.status.addons ?? []).map((a) => <li key={a.repository + a.name}><span><b>{a.name}</b> <small>{a.description}</small></span><Badge word={a.status} tone={a.status === 'enabled' ? 'good' : a.status === 'unknown' ? 'wait' : 'plain'} /></li>)}</ul></section>}
    </div>
    <section class="card"><h2>The last hour</h2>
      {changes.length > 0 && <ul class="plain">{changes.slice(0, 30).map((c) => <li><span>{c.what}</span><Time at={c.when} now={now} /></li>)}</ul>}
      {mayEvents ? <Events live={events} items={recent} now={now} link /> : changes.length === 0 && <Empty>Nothing that you may see has changed.</Empty>}
    </section>
  </main>
}
