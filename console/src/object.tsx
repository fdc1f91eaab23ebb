// The page of one object: what it is, why it is not running, what belongs to it, and what can be done.
import type { ComponentType } from 'preact'
import { useEffect, useMemo, useState } from 'preact/hooks'
import { ApiError, get, known, linkOf, nodesKind, ownerKind, pathOf, pods, send, useList, useMay, useTable, type Kind, type Meta, type Obj, type Row } from './api'
import { Usage } from './chart'
import { Events } from './events'
import { Grid } from './grid'
import { columnsOf, plural, useKind } from './list'
import { Logs } from './logs'
import { Act, Badge, Code, Dialog, Empty, Facts, Labels, Link, State, Tabs, Time, bytes, quantity, setQuery, useNow, useTitle } from './ui'
import { why, type Event } from './why'

export function ObjectPage({ group, resource, namespace, name, query }: { group: string; resource: string; namespace: string; name: string; query: URLSearchParams }) {
  const { kind, bad } = useKind(group, resource)
  const now = useNow(1000)
  useTitle(name)
  if (bad) return <main><State live={{ phase: 'error', message: bad }} what={resource} now={now} /></main>
  if (!kind) return <main><State live={{ phase: 'loading' }} what={name} now={now} /></main>
  return <One key={`${group}/${resource}/${namespace}/${name}`} kind={kind} namespace={namespace} name={name} query={query} now={now} />
}

const hidden = 'application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1'

function One({ kind, namespace, name, query, now }: { kind: Kind; namespace: string; name: string; query: URLSearchParams; now: number }) {
  const path = pathOf(kind, namespace, name)
  const secret = kind.group === '' && kind.resource === 'secrets'
  // Of a Secret only its metadata is read until its values are asked for.
  const list = useList(pathOf(kind, namespace), `fieldSelector=metadata.name%3D${name}`, secret ? hidden : 'application/json')
  const object = list.items[0]
  const [last, keep] = useState<Obj | undefined>()
  useEffect(() => { if (object) keep(object) }, [object])
  const shown = object ?? last
  const tab = query.get('tab') ?? 'overview'
  const isPod = kind.group === '' && kind.resource === 'pods'
  const at = { group: kind.group, ...(namespace ? { namespace } : {}) }
  const mayEvents = useMay({ verb: 'list', resource: 'events', ...(namespace ? { namespace } : {}) })
  const mayLogs = useMay(isPod ? { verb: 'get', resource: 'pods', subresource: 'log', namespace } : null)
  const mayShell = useMay(isPod ? { verb: 'create', resource: 'pods', subresource: 'exec', namespace } : null)
  const mayPatch = useMay(kind.verbs.includes('patch') ? { ...at, verb: 'patch', resource: kind.resource, name } : null)
  const tabs: [string, string][] = [['overview', 'Overview'], ['yaml', 'YAML']]
  if (mayEvents) tabs.push(['events', 'Events'])
  if (mayLogs) tabs.push(['logs', 'Logs'])
  if (mayShell) tabs.push(['shell', 'Shell'])
  const events = useList<Event>(mayEvents && shown ? (namespace ? `/k8s/api/v1/namespaces/${namespace}/events` : '/k8s/api/v1/events') : null, shown ? `fieldSelector=involvedObject.name%3D${name},involvedObject.kind%3D${kind.kind}` : '')
  const mine = events.items.filter((e) => !e.involvedObject?.uid || e.involvedObject.uid === shown?.metadata.uid || kind.resource === 'nodes')

  return <main>
    <nav class="crumbs" aria-label="Where this is"><Link to={linkOf(kind) + (namespace ? `?ns=${namespace}` : '')}>{plural(kind)}</Link>{namespace && <> / <Link to={linkOf({ group: '', resource: 'namespaces' }, '', namespace)}>{namespace}</Link></>}</nav>
    <header class="bar"><h1>{name}</h1>
      {shown && !object && list.phase === 'live' && <Badge word="deleted" tone="bad" />}
      {shown?.metadata.deletionTimestamp && object && <Badge word="Terminating" />}
      {shown && <Actions kind={kind} object={shown} gone={!object} />}
    </header>
    <State live={list} what={name} now={now} />
    {list.phase === 'live' && !shown && <Empty>There is no {kind.kind} {name}{namespace && ` in the namespace ${namespace}`}. <Link to={linkOf(kind)}>See all {plural(kind).toLowerCase()}</Link></Empty>}
    {shown && <>
      {isPod && <Why pod={shown} events={mine} />}
      <Tabs tabs={tabs} now={tab} onChange={(t) => setQuery({ tab: t === 'overview' ? '' : t })} />
      {tab === 'overview' && <Overview kind={kind} object={shown} path={path} now={now} secret={secret} />}
      {tab === 'yaml' && (secret ? <Ask what="The YAML has the values of this Secret."><Lazy load={() => import('./edit')} props={{ path, mayChange: mayPatch, version: shown.metadata.resourceVersion ?? '' }} /></Ask>
        : <Lazy load={() => import('./edit')} props={{ path, mayChange: mayPatch && !!object, version: shown.metadata.resourceVersion ?? '' }} />)}
      {tab === 'events' && <Events live={events} items={mine} now={now} />}
      {tab === 'logs' && isPod && mayLogs && <Logs pod={shown} />}
      {tab === 'shell' && isPod && mayShell && <Lazy load={() => import('./shell')} props={{ pod: shown }} />}
    </>}
  </main>
}

/** Lazy shows a part that is loaded when it is first needed. */
// eslint-disable-next-line -- the props are the part's
function Lazy({ load, props }: { load: () => Promise<{ default: ComponentType<any> }>; props: object }) {
  const [part, set] = useState<{ of: ComponentType<any> } | null>(null), [bad, setBad] = useState('')
  useEffect(() => { load().then((m) => set({ of: m.default }), (e: Error) => setBad(e.message)) }, [])
  return part ? <part.of {...props} /> : <State live={bad ? { phase: 'error', message: bad } : { phase: 'loading' }} what="this part of the page" now={0} />
}

function Why({ pod, events }: { pod: Obj; events: Event[] }) {
  const text = why(pod, events)
  return text ? <p class="why" role="status">{text}</p> : null
}

function Ask({ what, children }: { what: string; children: preact.ComponentChildren }) {
  const [yes, set] = useState(false)
  return yes ? <>{children}</> : <p class="state empty">{what} <button type="button" onClick={() => set(true)}>Show the values</button> <small>Asking is a call of the API server, which its audit log keeps.</small></p>
}

// What can be done ----------------------------------------------------------------------------------

const scales = ['deployments', 'statefulsets', 'replicasets'], restarts = ['deployments', 'statefulsets', 'daemonsets']

function Actions({ kind, object, gone }: { kind: Kind; object: Obj; gone: boolean }) {
  const m = object.metadata, path = pathOf(kind, m.namespace, m.name)
  const at = { group: kind.group, resource: kind.resource, ...(m.namespace ? { namespace: m.namespace } : {}) }
  const apps = kind.group === 'apps', isNode = kind.group === '' && kind.resource === 'nodes'
  const mayScale = useMay(apps && scales.includes(kind.resource) ? { ...at, verb: 'patch', subresource: 'scale' } : null)
  const mayPatch = useMay(apps && restarts.includes(kind.resource) || isNode || kind.resource === 'cronjobs' ? { ...at, verb: 'patch' } : null)
  const mayDelete = useMay(kind.verbs.includes('delete') && !isNode ? { ...at, verb: 'delete', name: m.name } : null)
  const [open, set] = useState('')
  const close = () => set('')
  if (gone) return null
  const merge = (body: object, to = path) => send<Obj>('PATCH', to + '?fieldManager=microk8s-console', body, 'application/merge-patch+json')
  return <span class="actions">
    {mayScale && <button type="button" onClick={() => set('scale')}>Scale</button>}
    {apps && restarts.includes(kind.resource) && mayPatch && <button type="button" onClick={() => set('restart')}>Restart</button>}
    {apps && kind.resource === 'deployments' && mayPatch && <button type="button" onClick={() => set('undo')}>Undo rollout</button>}
    {kind.resource === 'cronjobs' && mayPatch && <Act label={object.spec?.suspend ? 'Resume' : 'Suspend'} run={async () => { await merge({ spec: { suspend: !object.spec?.suspend } }) }} />}
    {isNode && mayPatch && <Act label={object.spec?.unschedulable ? 'Allow new pods (uncordon)' : 'No new pods (cordon)'} run={async () => { await merge({ spec: { unschedulable: object.spec?.unschedulable ? null : true } }) }} />}
    {mayDelete && <button type="button" class="danger" onClick={() => set('delete')}>Delete</button>}
    {open === 'scale' && <Scale object={object} close={close} run={(n) => merge({ spec: { replicas: n } }, path + '/scale')} />}
    {open === 'restart' && <Dialog title={`Restart ${m.name}`} onClose={close}>
      <p>All its pods are replaced, as its rollout strategy has it.</p>
      <footer><button type="button" onClick={close}>Cancel</button><Act label="Restart" kind="primary" run={async () => {
        await merge({ spec: { template: { metadata: { annotations: { 'kubectl.kubernetes.io/restartedAt': new Date().toISOString() } } } } })
        close()
      }} /></footer></Dialog>}
    {open === 'undo' && <Undo object={object} path={path} close={close} />}
    {open === 'delete' && <Delete kind={kind} object={object} path={path} close={close} />}
  </span>
}

function Scale({ object, close, run }: { object: Obj; close: () => void; run: (n: number) => Promise<unknown> }) {
  const [n, set] = useState(String(object.spec?.replicas ?? 1))
  const valid = /^\d{1,5}$/.test(n)
  return <Dialog title={`Scale ${object.metadata.name}`} onClose={close}>
    <label class="field">Replicas <input type="number" min={0} value={n} onInput={(e) => set(e.currentTarget.value)} /></label> <small>now {object.spec?.replicas ?? 1}</small>
    <footer><button type="button" onClick={close}>Cancel</button><Act label="Scale" kind="primary" disabled={!valid} run={async () => { await run(Number(n)); close() }} /></footer>
  </Dialog>
}

function Undo({ object, path, close }: { object: Obj; path: string; close: () => void }) {
  const revision = 'deployment.kubernetes.io/revision'
  const [sets, setSets] = useState<Obj[] | null>(null), [bad, setBad] = useState('')
  useEffect(() => {
    get<{ items: Obj[] }>(`/k8s/apis/apps/v1/namespaces/${object.metadata.namespace}/replicasets`).then((l) => setSets(l.items
      .filter((r) => r.metadata.ownerReferences?.some((o) => o.uid === object.metadata.uid) && r.metadata.annotations?.[revision])
      .sort((a, b) => Number(b.metadata.annotations![revision]) - Number(a.metadata.annotations![revision]))), (e: Error) => setBad(e.message))
  }, [])
  const present = object.metadata.annotations?.[revision]
  const earlier = sets?.filter((r) => r.metadata.annotations![revision] !== present) ?? []
  return <Dialog title={`Undo the rollout of ${object.metadata.name}`} onClose={close} wide>
    {!sets ? <State live={bad ? { phase: 'error', message: bad } : { phase: 'loading' }} what="its revisions" now={0} />
      : earlier.length === 0 ? <Empty>There is no earlier revision.</Empty>
        : <ul class="plain">{earlier.map((r) => <li><span><b>Revision {r.metadata.annotations![revision]}</b> <small>{(r.spec.template.spec.containers as { image: string }[]).map((c) => c.image).join(', ')}</small></span>
          <Act label="Go back to this" kind="primary" run={async () => {
            const template = structuredClone(r.spec.template)
            delete template.metadata?.labels?.['pod-template-hash']
            await send('PATCH', path + '?fieldManager=microk8s-console', [
              { op: 'test', path: '/metadata/uid', value: object.metadata.uid }, { op: 'replace', path: '/spec/template', value: template },
            ], 'application/json-patch+json')
            close()
          }} /></li>)}</ul>}
    <footer><button type="button" onClick={close}>Cancel</button></footer>
  </Dialog>
}

function Delete({ kind, object, path, close }: { kind: Kind; object: Obj; path: string; close: () => void }) {
  const m = object.metadata, heavy = ['Namespace', 'PersistentVolumeClaim', 'PersistentVolume', 'CustomResourceDefinition', 'StatefulSet', 'Secret'].includes(kind.kind)
  const [typed, set] = useState('')
  const consequence: Record<string, string> = {
    Namespace: 'Everything in it is deleted too.', PersistentVolumeClaim: 'Its data may be deleted with it.', CustomResourceDefinition: 'All objects of this kind are deleted too.',
    Pod: m.ownerReferences?.length ? 'Its owner makes another one.' : 'Nobody makes another one.', Deployment: 'Its pods are deleted too.', StatefulSet: 'Its pods are deleted too; its volumes stay.',
  }
  return <Dialog title={`Delete ${kind.kind} ${m.name}`} onClose={close}>
    <p>{consequence[kind.kind] ?? 'This cannot be undone.'}</p>
    {heavy && <label class="field">Type its name to delete it <input value={typed} autocomplete="off" onInput={(e) => set(e.currentTarget.value)} /></label>}
    <footer><button type="button" onClick={close}>Cancel</button><Act label="Delete" kind="danger" disabled={heavy && typed !== m.name} run={async () => {
      await send('DELETE', path, { apiVersion: 'v1', kind: 'DeleteOptions', propagationPolicy: 'Background', preconditions: { uid: m.uid } })
      close()
    }} /></footer>
  </Dialog>
}

// What it is ------------------------------------------------------------------------------------------

function Owners({ of }: { of: Meta }) {
  const [links, set] = useState<{ text: string; to?: string }[]>([])
  const refs = of.ownerReferences ?? []
  useEffect(() => {
    void Promise.all(refs.map(async (o) => {
      const k = await ownerKind(o.apiVersion, o.kind).catch(() => undefined)
      return { text: `${o.kind} ${o.name}`, ...(k ? { to: linkOf(k, k.namespaced ? of.namespace : '', o.name) } : {}) }
    })).then(set)
  }, [JSON.stringify(refs)])
  return <>{links.map((l) => l.to ? <Link to={l.to}>{l.text}</Link> : <span>{l.text}</span>)}</>
}

const conditionsGood: Record<string, string> = { MemoryPressure: 'False', DiskPressure: 'False', PIDPressure: 'False', NetworkUnavailable: 'False', ReplicaFailure: 'False', Failed: 'False' }

function Overview({ kind, object, path, now, secret }: { kind: Kind; object: Obj; path: string; now: number; secret: boolean }) {
  const m = object.metadata, s = object.spec ?? {}, st = object.status ?? {}
  const isPod = kind.group === '' && kind.resource === 'pods', isNode = kind === nodesKind
  const rows: [string, preact.ComponentChildren][] = [
    ['Namespace', m.namespace && <Link to={linkOf({ group: '', resource: 'namespaces' }, '', m.namespace)}>{m.namespace}</Link>],
    ['Made', <><Time at={m.creationTimestamp} now={now} /> ago</>],
    ['Owner', m.ownerReferences?.length ? <Owners of={m} /> : ''],
    ['Status', isPod ? <Badge word={st.reason ?? st.phase ?? 'Unknown'} /> : typeof st.phase === 'string' ? <Badge word={st.phase} /> : ''],
    ['Node', s.nodeName && <Link to={`/nodes/${s.nodeName}`}>{s.nodeName}</Link>],
    ['Addresses', (st.podIPs ?? []).map((p: { ip: string }) => p.ip).join(', ') || (st.addresses ?? []).map((a: { type: string; address: string }) => `${a.address} (${a.type})`).join(', ')],
    ['Service account', s.serviceAccountName && <Link to={linkOf({ group: '', resource: 'serviceaccounts' }, m.namespace, s.serviceAccountName)}>{s.serviceAccountName}</Link>],
    ['Replicas', s.replicas !== undefined && `${st.readyReplicas ?? 0} of ${s.replicas} ready, ${st.updatedReplicas ?? st.replicas ?? 0} up to date`],
    ['Type', s.type ?? object.type], ['Cluster IP', s.clusterIP],
    ['Ports', (s.ports ?? []).map((p: any) => `${p.name ? p.name + ' ' : ''}${p.port}${p.nodePort ? ':' + p.nodePort : ''}/${p.protocol}`).join(', ')],
    ['Hosts', (s.rules ?? []).map((r: any) => r.host).filter(Boolean).join(', ')],
    ['Storage', s.resources?.requests?.storage ?? s.capacity?.storage], ['Storage class', s.storageClassName], ['Schedule', typeof s.schedule === 'string' && <code>{s.schedule}</code>],
    ['Selector', s.selector && <Labels of={s.selector.matchLabels ?? (typeof Object.values(s.selector)[0] === 'string' ? s.selector : undefined)} />],
    ['Version', st.nodeInfo && `${st.nodeInfo.kubeletVersion}, ${st.nodeInfo.osImage}, kernel ${st.nodeInfo.kernelVersion}, ${st.nodeInfo.containerRuntimeVersion}, ${st.nodeInfo.architecture}`],
    ['Capacity', isNode && st.capacity && `${st.capacity.cpu} cores, ${bytes(quantity(st.capacity.memory))} of memory, ${st.capacity.pods} pods`],
    ['Taints', (s.taints ?? []).map((t: any) => `${t.key}${t.value ? '=' + t.value : ''}:${t.effect}`).join(', ')],
    ['Labels', m.labels && <Labels of={m.labels} />],
  ]
  return <>
    <section class="card" aria-label="About it"><Facts rows={rows} /></section>
    {Array.isArray(st.conditions) && st.conditions.length > 0 && <section class="card"><h2>Conditions</h2><ul class="plain">{st.conditions.map((c: any) =>
      <li><span><Badge word={c.type} tone={c.status === 'Unknown' ? 'wait' : c.status === (conditionsGood[c.type] ?? 'True') ? 'good' : 'bad'} /> <small>{c.status}{c.message ? `: ${c.message}` : c.reason ? `: ${c.reason}` : ''}</small></span><Time at={c.lastTransitionTime} now={now} /></li>)}</ul></section>}
    {isPod && <Containers pod={object} now={now} />}
    {secret && <section class="card"><h2>Values</h2><Ask what="The values are hidden."><Values path={path} /></Ask></section>}
    {kind.resource === 'configmaps' && <section class="card"><h2>Data</h2>{Object.entries({ ...object.data } as Record<string, string>).map(([k, v]) => <details open={v.length < 400}><summary>{k} <small>{bytes(v.length)}</small></summary><pre class="value" tabIndex={0}>{v}</pre></details>)}{!object.data && <Empty>It has no data.</Empty>}</section>}
    {isPod && <section class="card"><h2>Usage</h2><Usage query={`pod=${m.namespace}/${m.name}`} name={m.name} /></section>}
    {isNode && <section class="card"><h2>Usage</h2><Usage query={`node=${m.name}`} name={m.name} disk /></section>}
    {kind.resource === 'namespaces' && <section class="card"><h2>Usage of its pods</h2><Usage query={`namespace=${m.name}`} name={m.name} /></section>}
    <Children kind={kind} object={object} now={now} />
    {isNode && <section class="card"><h2>To take it out of the cluster</h2><p>On the node itself: <Code text="sudo microk8s leave" /></p><p>and if it is gone for good, on another one: <Code text={`microk8s remove-node ${m.name} --force`} /></p></section>}
  </>
}

function Containers({ pod, now }: { pod: Obj; now: number }) {
  const statuses: any[] = [...(pod.status?.initContainerStatuses ?? []), ...(pod.status?.containerStatuses ?? [])]
  const all: any[] = [...(pod.spec.initContainers ?? []).map((c: object) => ({ ...c, init: true })), ...pod.spec.containers]
  return <section class="card"><h2>Containers</h2><ul class="plain">{all.map((c) => {
    const s = statuses.find((x) => x.name === c.name), state = s?.state ?? {}
    const word = state.running ? (s.ready || c.init ? 'Running' : 'not ready') : state.waiting?.reason ?? state.terminated?.reason ?? 'waiting'
    const limits = c.resources?.limits ?? {}, requests = c.resources?.requests ?? {}
    return <li><span><b>{c.name}</b>{c.init && <small> init</small>} <Badge word={word} tone={word === 'not ready' ? 'wait' : toneFor(word)} /> <small class="wrap">{c.image}</small></span>
      <small>{s?.restartCount ? `${s.restartCount} restarts` : ''} {state.running && <>for <Time at={state.running.startedAt} now={now} /></>} {requests.cpu || requests.memory ? `asks for ${[requests.cpu, requests.memory].filter(Boolean).join(', ')}` : ''} {limits.cpu || limits.memory ? `at most ${[limits.cpu, limits.memory].filter(Boolean).join(', ')}` : ''}</small></li>
  })}</ul></section>
}
const toneFor = (w: string) => w === 'Completed' ? 'done' : w === 'Running' ? 'good' : /ContainerCreating|PodInitializing|waiting/.test(w) ? 'wait' : 'bad'

function Values({ path }: { path: string }) {
  const [data, set] = useState<Record<string, string> | null>(null), [bad, setBad] = useState('')
  useEffect(() => { get<Obj>(path).then((o) => set(o.data ?? {}), (e: ApiError) => setBad(e.message)) }, [path])
  if (!data) return <State live={bad ? { phase: bad ? 'error' : 'loading', message: bad } : { phase: 'loading' }} what="the values" now={0} />
  const text = (v: string) => { try { return new TextDecoder('utf-8', { fatal: true }).decode(Uint8Array.from(atob(v), (c) => c.charCodeAt(0))) } catch { return `(binary) ${v}` } }
  return <>{Object.entries(data).map(([k, v]) => <details open><summary>{k}</summary><pre class="value" tabIndex={0}>{text(v)}</pre></details>)}{!Object.keys(data).length && <Empty>It has none.</Empty>}</>
}

/** Children are what belongs to an object: by owner references, by its selector, or because they are on it. */
function Children({ kind, object, now }: { kind: Kind; object: Obj; now: number }) {
  const m = object.metadata, sel: Record<string, string> | undefined = kind.resource === 'services' ? object.spec?.selector : object.spec?.selector?.matchLabels
  const by = sel && Object.keys(sel).length ? 'labelSelector=' + encodeURIComponent(Object.entries(sel).map(([k, v]) => `${k}=${v}`).join(',')) : ''
  const find = (resource: string) => known.find((k) => k.resource === resource)!
  const owned = (r: Row) => !!r.meta.ownerReferences?.some((o) => o.uid === m.uid)
  const parts: { kind: Kind; ns: string; query: string; only?: (r: Row) => boolean }[] = []
  switch (kind.resource) {
    case 'deployments': parts.push({ kind: find('replicasets'), ns: m.namespace!, query: by, only: owned }, { kind: pods, ns: m.namespace!, query: by }); break
    case 'replicasets': case 'statefulsets': case 'daemonsets': case 'jobs': parts.push({ kind: pods, ns: m.namespace!, query: by, only: owned }); break
    case 'cronjobs': parts.push({ kind: find('jobs'), ns: m.namespace!, query: '', only: owned }); break
    case 'services': if (by) parts.push({ kind: pods, ns: m.namespace!, query: by }); break
    case 'nodes': parts.push({ kind: pods, ns: '', query: `fieldSelector=spec.nodeName%3D${m.name}` }); break
    case 'namespaces': parts.push({ kind: find('deployments'), ns: m.name, query: '' }, { kind: pods, ns: m.name, query: '' }, { kind: find('services'), ns: m.name, query: '' }); break
  }
  return <>{parts.map((p) => <Part key={p.kind.resource} {...p} now={now} />)}</>
}

function Part({ kind, ns, query, only, now }: { kind: Kind; ns: string; query: string; only?: (r: Row) => boolean; now: number }) {
  const table = useTable(pathOf(kind, ns), query)
  const rows = useMemo(() => only ? table.rows.filter(only) : table.rows, [table.rows])
  const [sorted, sort] = useState('Name')
  return <section class="card"><h2>{plural(kind)} <small>{table.phase === 'live' ? rows.length : ''}</small></h2>
    <State live={table} what={plural(kind).toLowerCase()} now={now} />
    {table.phase === 'live' && !rows.length && <Empty>There are none.</Empty>}
    {rows.length > 0 && <div class={rows.length > 8 ? 'part tall' : 'part'} style={{ '--rows': String(Math.min(rows.length, 9)) }}><Grid label={plural(kind)} columns={columnsOf(table.columns, kind, kind.namespaced && !ns, now)} rows={rows} id={(r) => r.meta.uid} link={(r) => linkOf(kind, r.meta.namespace, r.meta.name)} sorted={sorted} onSort={sort} /></div>}
  </section>
}
