// Calls of the server: who is logged in, the Kubernetes API as that person, and what streams.
import { useEffect, useRef, useState } from 'preact/hooks'

export interface Session { user: string; groups?: string[]; own: boolean; namespace?: string; csrf: string; node: boolean }

export class ApiError extends Error {
  constructor(readonly status: number, readonly reason: string, message: string) { super(message) }
  get forbidden() { return this.status === 403 }
  get noAPI() { return this.reason === 'ConsoleNoAPI' || this.status === 0 || this.status === 503 }
}

let current: Session | null = null
let lost: () => void = () => {}
export function setSession(s: Session | null, onLost: () => void) { current = s; lost = onLost; rights.clear() }
export const session = () => current

/** wrong makes the error of an answer that is none. */
async function wrong(resp: Response): Promise<ApiError> {
  const text = await resp.text().catch(() => '')
  let message = text.slice(0, 2000) || resp.statusText, reason = ''
  try {
    const status = JSON.parse(text)
    message = status.message ?? message
    reason = status.reason ?? ''
  } catch {
    // Where YAML is asked for, errors are YAML too.
    const said = /^message: (.*(?:\n {2}.*)*)/m.exec(text)?.[1]
    if (/^kind: Status$/m.test(text) && said) message = said.replace(/\n\s*/g, ' ').replace(/^[|>]-? |^(['"])(.*)\1$/g, '$2').replace(/''/g, "'").replace(/\\"/g, '"')
  }
  if (resp.status === 401 && (reason === 'ConsoleLogin' || reason === 'Unauthorized')) lost()
  return new ApiError(resp.status, reason, message)
}

type Init = Omit<RequestInit, 'headers'> & { headers?: Record<string, string> }

export async function request(path: string, init: Init = {}): Promise<Response> {
  const headers: Record<string, string> = { Accept: 'application/json', ...init.headers }
  if (current && init.method && init.method !== 'GET') headers['X-CSRF-Token'] = current.csrf
  let resp: Response
  try {
    resp = await fetch(path, { ...init, headers, credentials: 'same-origin', cache: 'no-store' })
  } catch (e) {
    if ((e as Error).name === 'AbortError') throw e
    throw new ApiError(0, 'ConsoleNoAPI', 'the console’s server does not answer: is microk8s dashboard-proxy still running?')
  }
  if (!resp.ok) throw await wrong(resp)
  return resp
}

export async function get<T>(path: string, signal?: AbortSignal, accept?: string): Promise<T> {
  const init: Init = {}
  if (signal) init.signal = signal
  if (accept) init.headers = { Accept: accept }
  return (await request(path, init)).json()
}

export async function send<T>(method: string, path: string, body: unknown, type = 'application/json'): Promise<T> {
  const resp = await request(path, { method, headers: { 'Content-Type': type }, ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }) })
  return resp.json()
}

/** lines calls each for every line of a stream, until it ends. */
export async function lines(path: string, signal: AbortSignal, each: (line: string) => void, accept = 'application/json', opened: () => void = () => {}) {
  const resp = await request(path, { signal, headers: { Accept: accept } })
  opened()
  const reader = resp.body!.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (;;) {
    const { done, value } = await reader.read()
    if (done) break
    const parts = (rest + value).split('\n')
    rest = parts.pop()!
    for (const p of parts) each(p)
  }
  if (rest) each(rest)
}

const sleep = (ms: number, signal: AbortSignal) => new Promise<void>((done) => {
  const timer = setTimeout(done, ms)
  signal.addEventListener('abort', () => { clearTimeout(timer); done() }, { once: true })
})

// Rights are asked for one at a time and remembered for half a minute.
interface Right { verb: string; group?: string; resource: string; subresource?: string; namespace?: string; name?: string }
const rights = new Map<string, { when: number; yes: Promise<boolean> }>()
export function may(want: Right): Promise<boolean> {
  const key = JSON.stringify(want)
  const known = rights.get(key)
  if (known && Date.now() - known.when < 30000) return known.yes
  const yes = send<{ status: { allowed: boolean } }>('POST', '/k8s/apis/authorization.k8s.io/v1/selfsubjectaccessreviews', {
    apiVersion: 'authorization.k8s.io/v1', kind: 'SelfSubjectAccessReview', spec: { resourceAttributes: want },
  }).then((r) => r.status.allowed, () => { rights.delete(key); return false })
  rights.set(key, { when: Date.now(), yes })
  return yes
}

/** useMay reports whether the person has a right; false until it is known. */
export function useMay(want: Right | null): boolean {
  const [yes, set] = useState(false)
  const key = JSON.stringify(want)
  useEffect(() => {
    let here = true
    set(false)
    if (want) void may(want).then((y) => here && set(y))
    return () => { here = false }
  }, [key])
  return yes
}

// Kinds -----------------------------------------------------------------------------------------

export interface Kind { group: string; version: string; resource: string; kind: string; namespaced: boolean; verbs: string[] }
export const kindKey = (k: { group: string; resource: string }) => `${k.group || 'core'}/${k.resource}`
export const groupPath = (k: Kind) => k.group ? `/k8s/apis/${k.group}/${k.version}` : `/k8s/api/${k.version}`
export function pathOf(k: Kind, namespace?: string, name?: string) {
  return groupPath(k) + (k.namespaced && namespace ? `/namespaces/${namespace}` : '') + `/${k.resource}` + (name ? `/${name}` : '')
}
/** linkOf is the address of an object's page, or of a list. */
export function linkOf(k: { group: string; resource: string }, namespace?: string, name?: string) {
  return `/workloads/${k.group || 'core'}/${k.resource}` + (name ? `/${namespace || '-'}/${encodeURIComponent(name)}` : '')
}
const kind = (group: string, version: string, resource: string, name: string, namespaced = true): Kind =>
  ({ group, version, resource, kind: name, namespaced, verbs: ['get', 'list', 'watch', 'delete', 'patch', 'update', 'create'] })

/** Kinds that every cluster has, so that pages of them need no discovery. */
export const known: Kind[] = [
  kind('apps', 'v1', 'deployments', 'Deployment'), kind('apps', 'v1', 'statefulsets', 'StatefulSet'), kind('apps', 'v1', 'daemonsets', 'DaemonSet'),
  kind('apps', 'v1', 'replicasets', 'ReplicaSet'), kind('batch', 'v1', 'jobs', 'Job'), kind('batch', 'v1', 'cronjobs', 'CronJob'), kind('', 'v1', 'pods', 'Pod'),
  kind('', 'v1', 'services', 'Service'), kind('networking.k8s.io', 'v1', 'ingresses', 'Ingress'), kind('networking.k8s.io', 'v1', 'networkpolicies', 'NetworkPolicy'),
  kind('', 'v1', 'persistentvolumeclaims', 'PersistentVolumeClaim'), kind('', 'v1', 'persistentvolumes', 'PersistentVolume', false),
  kind('storage.k8s.io', 'v1', 'storageclasses', 'StorageClass', false), kind('', 'v1', 'configmaps', 'ConfigMap'), kind('', 'v1', 'secrets', 'Secret'),
  kind('', 'v1', 'serviceaccounts', 'ServiceAccount'), kind('', 'v1', 'namespaces', 'Namespace', false), kind('', 'v1', 'nodes', 'Node', false), kind('', 'v1', 'events', 'Event'),
  kind('apiextensions.k8s.io', 'v1', 'customresourcedefinitions', 'CustomResourceDefinition', false),
]
export const pods = known.find((k) => k.resource === 'pods')!
export const nodesKind = known.find((k) => k.resource === 'nodes')!

interface Discovery { items?: { metadata?: { name?: string }; versions: { version: string; resources?: { resource: string; responseKind: { kind: string; group?: string; version?: string }; scope: string; verbs: string[] }[] }[] }[] }
let discovered: Promise<Kind[]> | null = null
/** kinds asks the API server for all kinds that can be listed, each in its preferred version. */
export function kinds(again = false): Promise<Kind[]> {
  if (discovered && !again) return discovered
  const accept = 'application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList'
  discovered = Promise.all(['/k8s/api', '/k8s/apis'].map((p) => get<Discovery>(p, undefined, accept))).then((all) => {
    const out = new Map<string, Kind>()
    for (const g of all.flatMap((d) => d.items ?? [])) {
      for (const v of g.versions) {
        for (const r of v.resources ?? []) {
          const k: Kind = { group: g.metadata?.name ?? '', version: v.version, resource: r.resource, kind: r.responseKind.kind, namespaced: r.scope === 'Namespaced', verbs: r.verbs }
          if (r.verbs.includes('list') && !out.has(kindKey(k))) out.set(kindKey(k), k)
        }
      }
    }
    return [...out.values()].sort((a, b) => a.kind.localeCompare(b.kind))
  })
  discovered.catch(() => { discovered = null })
  return discovered
}

export async function findKind(group: string, resource: string): Promise<Kind | undefined> {
  const is = (k: Kind) => (k.group || 'core') === group && k.resource === resource
  return known.find(is) ?? (await kinds()).find(is) ?? (await kinds(true)).find(is)
}

/** ownerKind is the kind of an owner reference. */
export function ownerKind(apiVersion: string, name: string): Promise<Kind | undefined> {
  const group = apiVersion.includes('/') ? apiVersion.split('/')[0]! : ''
  const is = (k: Kind) => k.group === group && k.kind === name
  const k = known.find(is)
  return k ? Promise.resolve(k) : kinds().then((all) => all.find(is), () => undefined)
}

// Objects ---------------------------------------------------------------------------------------

export interface Meta {
  name: string; namespace?: string; uid: string; resourceVersion?: string; creationTimestamp: string; deletionTimestamp?: string
  labels?: Record<string, string>; annotations?: Record<string, string>; generation?: number
  ownerReferences?: { apiVersion: string; kind: string; name: string; uid: string; controller?: boolean }[]
}
// eslint-disable-next-line -- objects are of any kind
export type Obj = { apiVersion?: string; kind?: string; metadata: Meta; spec?: any; status?: any; [field: string]: any }

export type Phase = 'loading' | 'live' | 'stale' | 'forbidden' | 'error'
export interface Live { phase: Phase; message?: string; since?: number }

export interface Column { name: string; type: string; format?: string; priority: number; description?: string }
export interface Row { meta: Meta; cells: unknown[]; text: string }
export interface Table extends Live { columns: Column[]; rows: Row[] }

interface TableAnswer { columnDefinitions?: Column[]; rows?: { cells: unknown[]; object: { metadata: Meta & { managedFields?: unknown } } }[]; metadata?: { resourceVersion?: string; continue?: string } }

const tableAccept = 'application/json;as=Table;v=v1;g=meta.k8s.io'

/** slim keeps what lists and filters need of an object's metadata: of 10,000 pods the rest is megabytes. */
function slim(m: Meta): Meta {
  const out: Meta = { name: m.name, uid: m.uid, creationTimestamp: m.creationTimestamp }
  if (m.namespace) out.namespace = m.namespace
  if (m.deletionTimestamp) out.deletionTimestamp = m.deletionTimestamp
  if (m.labels) out.labels = m.labels
  if (m.ownerReferences) out.ownerReferences = m.ownerReferences
  return out
}

const rowOf = (r: { cells: unknown[]; object: { metadata: Meta } }): Row => {
  const meta = slim(r.object.metadata)
  return { meta, cells: r.cells, text: [meta.namespace ?? '', ...r.cells.map(String), ...Object.entries(meta.labels ?? {}).map(([k, v]) => `${k}=${v}`)].join(' ').toLowerCase() }
}

/** follow lists, then watches from there, over and over until signal ends. */
async function follow(path: string, query: string, accept: string, signal: AbortSignal, on: {
  page: (data: any, first: boolean, last: boolean) => void
  event: (type: string, object: any) => void
  phase: (l: Live) => void
}) {
  let pause = 500
  const join = (q: string) => `${path}?${query ? query + '&' : ''}${q}`
  while (!signal.aborted) {
    try {
      let token = '', version = '', first = true
      do {
        const list: any = await get(join(`limit=500${token ? '&continue=' + encodeURIComponent(token) : ''}`), signal, accept)
        token = list.metadata?.continue ?? ''
        version = list.metadata?.resourceVersion ?? ''
        on.page(list, first, !token)
        first = false
      } while (token && !signal.aborted)
      on.phase({ phase: 'live' })
      pause = 500
      for (let gone = false; !gone && !signal.aborted;) {
        const begun = Date.now()
        await lines(join(`watch=true&allowWatchBookmarks=true&timeoutSeconds=290&resourceVersion=${version}`), signal, (line) => {
          if (!line) return
          const e = JSON.parse(line)
          if (e.type === 'ERROR') { gone = true; return }
          const object = e.object
          version = object.metadata?.resourceVersion ?? object.rows?.[0]?.object?.metadata?.resourceVersion ?? version
          if (e.type !== 'BOOKMARK') on.event(e.type, object)
        }, accept)
        if (Date.now() - begun < 1000) { gone = true; await sleep(pause, signal) }
      }
    } catch (e) {
      if (signal.aborted) return
      const err = e instanceof ApiError ? e : new ApiError(0, 'ConsoleNoAPI', 'the connection was lost')
      on.phase(err.forbidden ? { phase: 'forbidden', message: err.message } : err.noAPI || err.status >= 500 || err.status === 429 ? { phase: 'stale', message: err.message, since: Date.now() } : { phase: 'error', message: err.message })
      if (err.status === 401) return
      await sleep(err.forbidden ? 30000 : pause, signal)
      pause = Math.min(pause * 2, 5000)
    }
  }
}

/** useTable is the list of a kind as the server prints it, updated by watch. path null means nothing. */
export function useTable(path: string | null, query = ''): Table {
  const [table, set] = useState<Table>({ phase: 'loading', columns: [], rows: [] })
  useEffect(() => {
    set({ phase: 'loading', columns: [], rows: [] })
    if (!path) return
    const stop = new AbortController()
    let byID = new Map<string, Row>(), next = byID, columns: Column[] = [], live: Live = { phase: 'loading' }
    let timer = 0
    // Changes are shown together, at most ten times a second.
    const show = () => {
      if (timer) return
      timer = window.setTimeout(() => { timer = 0; set({ ...live, columns, rows: [...byID.values()] }) }, byID.size > 2000 ? 250 : 100)
    }
    const take = (t: TableAnswer, into: Map<string, Row>) => {
      if (t.columnDefinitions?.length) columns = t.columnDefinitions
      for (const r of t.rows ?? []) into.set(r.object.metadata.uid, rowOf(r))
    }
    void follow(path, (query ? query + '&' : '') + 'includeObject=Metadata', tableAccept, stop.signal, {
      page: (data, first, last) => {
        if (first) next = new Map()
        take(data, next)
        if (last || live.phase === 'loading') { byID = next; show() }
      },
      event: (type, object: TableAnswer) => {
        if (type === 'DELETED') for (const r of object.rows ?? []) byID.delete(r.object.metadata.uid)
        else take(object, byID)
        show()
      },
      phase: (l) => {
        if (l.phase === 'stale' && live.phase === 'stale') l.since = live.since!
        live = l
        show()
      },
    })
    return () => { stop.abort(); clearTimeout(timer) }
  }, [path, query])
  return table
}

export interface List<T> extends Live { items: T[] }

/** useList is whole objects, updated by watch: for what is small. */
export function useList<T extends Obj = Obj>(path: string | null, query = '', accept = 'application/json'): List<T> {
  const [list, set] = useState<List<T>>({ phase: 'loading', items: [] })
  useEffect(() => {
    set({ phase: 'loading', items: [] })
    if (!path) return
    const stop = new AbortController()
    let byID = new Map<string, T>(), next = byID, live: Live = { phase: 'loading' }, timer = 0
    const show = () => { if (!timer) timer = window.setTimeout(() => { timer = 0; set({ ...live, items: [...byID.values()] }) }, 80) }
    void follow(path, query, accept, stop.signal, {
      page: (data, first, last) => {
        if (first) next = new Map()
        for (const o of data.items ?? []) next.set(o.metadata.uid, o)
        if (last) { byID = next; show() }
      },
      event: (type, o) => { if (type === 'DELETED') byID.delete(o.metadata.uid); else byID.set(o.metadata.uid, o); show() },
      phase: (l) => {
        if (l.phase === 'stale' && live.phase === 'stale') l.since = live.since!
        live = l
        show()
      },
    })
    return () => { stop.abort(); clearTimeout(timer) }
  }, [path, query, accept])
  return list
}

// The node ----------------------------------------------------------------------------------------

export interface Facts {
  node: string; version: string; headline: string; tolerates?: string
  status: {
    microk8s: { running: boolean; message?: string; slow?: boolean }
    'high-availability': { enabled: boolean; nodes?: { address: string; role: string; alive: boolean }[]; endpoints?: string[] }
    addons?: { name: string; repository: string; description: string; version: string; status: string }[]
    problems?: { id: string; what: string; do?: string; 'looked-at': string }[]
    'not-looked-at'?: { id: string; 'looked-at': string; why: string }[]
  }
  members?: { address: string; role: string; online: boolean; leader: boolean; self: boolean; diskFull?: boolean }[]
  space?: { bytes: number; quota?: number; refused?: boolean; largest?: { prefix: string; keys: number; bytes: number }[] }
  services?: { name: string; phase: string; since?: string; restarts?: number; lastExit?: string }[]
  certificates?: { file: string; title: string; daysLeft: number; expires: string }[]
}

export interface NodeState extends Live { facts?: Facts; changes: { when: number; what: string }[] }

/** useNode is what the local node knows, also while the API server is down. */
export function useNode(on: boolean): NodeState {
  const [state, set] = useState<NodeState>({ phase: 'loading', changes: [] })
  const last = useRef<Facts | undefined>(undefined)
  useEffect(() => {
    if (!on) { set({ phase: 'forbidden', changes: [] }); return }
    const stop = new AbortController()
    const run = async () => {
      let pause = 500
      while (!stop.signal.aborted) {
        try {
          await lines('/api/node', stop.signal, (line) => {
            if (!line) return
            pause = 500
            const facts: Facts = JSON.parse(line)
            const changes = differences(last.current, facts)
            last.current = facts
            set((s) => ({ phase: 'live', facts, changes: [...changes, ...s.changes].slice(0, 100) }))
          }, 'application/x-ndjson')
          throw new ApiError(0, '', 'the connection was lost')
        } catch (e) {
          if (stop.signal.aborted) return
          const err = e as ApiError
          set((s) => ({ ...s, phase: err.forbidden ? 'forbidden' : 'stale', message: err.message, since: s.phase === 'stale' ? s.since! : Date.now() }))
          if (err.status === 401) return
          await sleep(err.forbidden ? 30000 : pause, stop.signal)
          pause = Math.min(pause * 2, 5000)
        }
      }
    }
    void run()
    return () => stop.abort()
  }, [on])
  return state
}

/** differences says what became different between two states of the node. */
function differences(a: Facts | undefined, b: Facts): { when: number; what: string }[] {
  if (!a) return []
  const out: string[] = []
  const leader = (f: Facts) => f.members?.find((m) => m.leader)?.address
  if (leader(b) && leader(a) !== leader(b)) out.push(`the datastore is led by ${leader(b)} now`)
  for (const m of b.members ?? []) {
    const before = a.members?.find((x) => x.address === m.address)
    if (!before) { if (a.members) out.push(`${m.address} is a member of the datastore now`) }
    else if (before.online !== m.online) out.push(`the datastore’s member ${m.address} ${m.online ? 'answers again' : 'does not answer'}`)
    else if (before.role !== m.role) out.push(`the datastore’s member ${m.address} is a ${m.role} now`)
  }
  for (const x of b.status.addons ?? []) {
    const before = a.status.addons?.find((y) => y.name === x.name && y.repository === x.repository)
    if (before && before.status !== x.status && x.status !== 'unknown' && before.status !== 'unknown') out.push(`the addon ${x.name} is ${x.status} now`)
  }
  for (const c of b.certificates ?? []) {
    const before = a.certificates?.find((y) => y.file === c.file)
    if (before && before.expires !== c.expires) out.push(`the certificate ${c.file} was renewed`)
  }
  if (a.headline !== b.headline) out.push(b.headline)
  return out.map((what) => ({ when: Date.now(), what }))
}
