// Nodes and the datastore: members, latencies, certificates, and how machines join and leave.
import { useEffect, useState } from 'preact/hooks'
import { ApiError, get, nodesKind, send, session, useMay, useTable, type NodeState } from './api'
import { ClusterCharts, useSamples } from './chart'
import { Grid } from './grid'
import { columnsOf } from './list'
import { Members } from './members'
import { NodeStatus } from './overview'
import { Act, Badge, Code, Empty, State, Time, bytes, cores, setQuery, useNow, useTitle } from './ui'

export function NodesPage({ node, query }: { node: NodeState; query: URLSearchParams }) {
  useTitle('Nodes and datastore')
  const now = useNow()
  const table = useTable('/k8s/api/v1/nodes')
  const usage = useSamples(table.phase === 'forbidden' ? null : 'nodes')
  const latest = (name: string, what: string) => usage.lines[name]?.[what]?.findLast((v) => v !== null) ?? undefined
  const f = node.facts, used = f?.space ? f.space.bytes / (f.space.quota || Infinity) : 0
  const columns = columnsOf(table.columns, nodesKind, false, now)
  columns.splice(Math.max(0, columns.findIndex((c) => c.name === 'Age')), 0,
    { name: 'CPU', width: '6rem', least: 700, cell: (r) => { const v = latest(r.meta.name, 'cpu'); return v === undefined ? '–' : cores(v) }, sort: (r) => latest(r.meta.name, 'cpu') ?? -1 },
    { name: 'Memory', width: '7rem', least: 700, cell: (r) => { const v = latest(r.meta.name, 'memory'); return v === undefined ? '–' : bytes(v) }, sort: (r) => latest(r.meta.name, 'memory') ?? -1 },
    { name: 'Disk', width: '7rem', least: 900, cell: (r) => { const v = latest(r.meta.name, 'disk'); return v === undefined ? '–' : bytes(v) }, sort: (r) => latest(r.meta.name, 'disk') ?? -1 })
  return <main>
    <header class="bar"><h1>Nodes and datastore</h1></header>
    <NodeStatus node={node} now={now} short />
    <section class="card"><h2>Nodes <small>{table.phase === 'live' ? table.rows.length : ''}</small></h2>
      <State live={table} what="the nodes" now={now} />
      {table.rows.length > 0 && <div class={table.rows.length > 8 ? 'part tall' : 'part'} style={{ '--rows': String(Math.min(table.rows.length, 9)) }}><Grid label="Nodes" columns={columns} rows={table.rows} id={(r) => r.meta.uid} link={(r) => `/nodes/${r.meta.name}`} sorted={query.get('sort') ?? 'Name'} onSort={(s) => setQuery({ sort: s })} /></div>}
    </section>
    <div class="columns">
      {f?.members && <section class="card"><h2>Members of the datastore</h2><Members members={f.members} /></section>}
      {f?.space && <section class="card"><h2>Size of the datastore</h2>
        <p>{bytes(f.space.bytes)}{f.space.quota ? ` of ${bytes(f.space.quota)}` : ', without a quota'}{f.space.refused && <> <Badge word="refuses writes" tone="bad" /></>}</p>
        {!!f.space.quota && <meter min={0} max={1} low={0.6} high={0.8} optimum={0} value={used} aria-label="Part of the quota that is used">{Math.round(used * 100)} %</meter>}
        {!!f.space.largest?.length && <ul class="plain">{f.space.largest.slice(0, 5).map((p) => <li><code>{p.prefix}</code><small>{bytes(p.bytes)} in {p.keys} keys</small></li>)}</ul>}</section>}
    </div>
    <section class="card"><h2>Calls</h2><ClusterCharts /></section>
    <div class="columns">
      {f?.certificates && <section class="card"><h2>Certificates of {f.node}</h2><ul class="plain">{f.certificates.map((c) => <li><span><b>{c.file}</b> <small>{c.title}</small></span><span><Badge word={`${c.daysLeft} days`} tone={c.daysLeft < 14 ? 'bad' : c.daysLeft < 30 ? 'wait' : 'good'} /> <small>until {c.expires.slice(0, 10)}</small></span></li>)}</ul></section>}
      {f?.services && <section class="card"><h2>Services of {f.node}</h2><ul class="plain">{f.services.map((s) => <li><span><b>{s.name}</b>{!!s.restarts && <small> restarted {s.restarts} times{s.lastExit ? `, last: ${s.lastExit}` : ''}</small>}</span><span><Badge word={s.phase} /> {s.since && <small>for <Time at={s.since} now={now} /></small>}</span></li>)}</ul></section>}
    </div>
    {session()?.node && <Join />}
    <section class="card"><h2>To take a node out</h2><p>On the node itself: <Code text="sudo microk8s leave" /></p><p>If it is gone for good, on another one: <Code text="microk8s remove-node NODE --force" /></p></section>
  </main>
}

interface Token { id: string; role: string; node?: string; uses: string; expires?: string; state: string; nodes?: string[] }
interface Made { role: string; expires?: string; commands: string[]; token: string }

function Join() {
  const may = useMay({ verb: 'update', resource: 'secrets', namespace: 'kube-system' })
  const now = useNow()
  const [tokens, set] = useState<Token[] | null>(null), [bad, setBad] = useState(''), [made, setMade] = useState<Made | null>(null)
  const [role, setRole] = useState('control-plane'), [name, setName] = useState(''), [expires, setExpires] = useState('1h'), [many, setMany] = useState(false)
  const load = () => get<{ items: Token[] }>('/api/tokens').then((l) => { set(l.items ?? []); setBad('') }, (e: ApiError) => setBad(e.message))
  useEffect(() => { if (may) void load() }, [may])
  if (!may) return null
  return <section class="card"><h2>Join another machine</h2>
    <div class="bar">
      <label class="field">As <select value={role} onChange={(e) => setRole(e.currentTarget.value)}><option value="control-plane">control plane</option><option value="worker">worker</option></select></label>
      <label class="field">Name of the machine <input value={name} placeholder="any" onInput={(e) => setName(e.currentTarget.value)} /></label>
      <label class="field">Good for <select value={expires} onChange={(e) => setExpires(e.currentTarget.value)}><option value="10m">10 minutes</option><option value="1h">1 hour</option><option value="24h">1 day</option><option value="168h">7 days</option></select></label>
      <label class="check"><input type="checkbox" checked={many} disabled={!!name} onChange={(e) => setMany(e.currentTarget.checked)} /> Any number of machines</label>
      <Act label="Make a join command" kind="primary" run={async () => { setMade(await send<Made>('POST', '/api/tokens', { worker: role === 'worker', name: name.trim(), expires, many: many && !name })); await load() }} />
    </div>
    {role === 'control-plane' && <p><small>Whoever has it can join as a control-plane node and gets the keys of the whole cluster.</small></p>}
    {made && <div role="status"><p>Type this on the other machine. It is shown once, here.</p>{made.commands.map((c) => <p><Code text={'sudo ' + c} /></p>)}</div>}
    <h3>Tokens</h3>
    {bad && <State live={{ phase: 'error', message: bad }} what="the tokens" now={now} />}
    {!bad && !tokens && <State live={{ phase: 'loading' }} what="the tokens" now={now} />}
    {tokens && !tokens.length && <Empty>There are none.</Empty>}
    <ul class="plain">{(tokens ?? []).map((t) => <li key={t.id}><span><code>{t.id}</code> <Badge word={t.state} tone={t.state === 'valid' ? 'good' : t.state.startsWith('joining') ? 'wait' : 'done'} /> <small>{t.role}{t.node ? `, only ${t.node}` : ''}, uses: {t.uses}{t.expires ? `, until ${new Date(t.expires).toLocaleString()}` : ', without an end'}</small></span>
      {(t.state === 'valid' || t.state.startsWith('joining')) && <Act label="Revoke" kind="danger" run={async () => { await send('POST', `/api/tokens/${t.id}/revoke`, {}); await load() }} />}</li>)}</ul>
  </section>
}
