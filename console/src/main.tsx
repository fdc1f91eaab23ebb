// The frame of the page: who is logged in, where one is, and the navigation.
import { render } from 'preact'
import { useEffect, useState } from 'preact/hooks'
import { kindKey, known, linkOf, may, setSession, useMay, useNode, type Kind, type Session } from './api'
import { AllKinds, EventsPage, ListPage, plural, useNamespace } from './list'
import { Login } from './login'
import { NodesPage } from './nodes'
import { ObjectPage } from './object'
import { Overview } from './overview'
import { Dialog, Link, go, useAddress } from './ui'

function theme(choice?: string) {
  if (choice) localStorage.setItem('theme', choice)
  const now = localStorage.getItem('theme') ?? (matchMedia('(prefers-color-scheme: light)').matches ? 'light' : 'dark')
  document.documentElement.dataset.theme = now
  return now
}
theme()
matchMedia('(prefers-color-scheme: light)').addEventListener('change', () => theme())

const groups: [string, string[]][] = [
  ['Workloads', ['apps/deployments', 'apps/statefulsets', 'apps/daemonsets', 'batch/jobs', 'batch/cronjobs', 'core/pods']],
  ['Network', ['core/services', 'networking.k8s.io/ingresses', 'networking.k8s.io/networkpolicies']],
  ['Storage', ['core/persistentvolumeclaims', 'core/persistentvolumes']],
  ['Configuration', ['core/configmaps', 'core/secrets']],
  ['Cluster', ['core/namespaces', 'core/events', 'apiextensions.k8s.io/customresourcedefinitions']],
]
const listed: Kind[] = groups.flatMap(([, keys]) => keys.map((key) => known.find((k) => kindKey(k) === key)!))

function Nav({ path, query, open, close }: { path: string; query: URLSearchParams; open: boolean; close: () => void }) {
  const namespace = useNamespace(query)
  const [allowed, set] = useState<Record<string, boolean>>({})
  useEffect(() => {
    let here = true
    const look = () => {
      for (const k of listed) void may({ verb: 'list', group: k.group, resource: k.resource, ...(k.namespaced && namespace ? { namespace } : {}) }).then((y) => here && set((a) => a[kindKey(k)] === y ? a : { ...a, [kindKey(k)]: y }))
      void may({ verb: 'list', group: '', resource: 'nodes' }).then((y) => here && set((a) => a.nodes === y ? a : { ...a, nodes: y }))
    }
    look()
    const timer = setInterval(look, 60000)
    return () => { here = false; clearInterval(timer) }
  }, [namespace])
  const item = (to: string, label: string, on: boolean) => <li><Link to={to} class={on ? 'on' : ''} aria-current={on ? 'page' : undefined} onClickCapture={close}>{label}</Link></li>
  const keep = query.get('ns') ? `?ns=${query.get('ns')}` : ''
  return <nav id="nav" class={open ? 'nav open' : 'nav'} aria-label="Main">
    <ul>{item('/', 'Overview', path === '/')}{allowed.nodes && item('/nodes', 'Nodes and datastore', path.startsWith('/nodes'))}</ul>
    {groups.map(([name, keys]) => {
      const kinds = keys.map((key) => known.find((k) => kindKey(k) === key)!).filter((k) => allowed[kindKey(k)])
      if (!kinds.length && name !== 'Cluster') return null
      return <><h2>{name}</h2><ul>{kinds.map((k) => item(linkOf(k) + keep, plural(k), path.startsWith(linkOf(k) + '/') || path === linkOf(k)))}{name === 'Cluster' && item('/workloads' + keep, 'All kinds', path === '/workloads')}</ul></>
    })}
  </nav>
}

function Frame({ session, onLogout }: { session: Session; onLogout: () => void }) {
  const { path, query } = useAddress()
  const mayNodes = useMay(session.node && !session.own ? { verb: 'list', resource: 'nodes' } : null)
  const node = useNode(session.node && (session.own || mayNodes))
  const [menu, setMenu] = useState(false), [help, setHelp] = useState(false), [dark, setDark] = useState(theme())
  useEffect(() => {
    let g = 0
    const on = (e: KeyboardEvent) => {
      if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test((e.target as HTMLElement).tagName)) return
      if (e.key === '?') setHelp(true)
      const to = Date.now() - g < 1500 ? ({ o: '/', n: '/nodes', d: linkOf(known[0]!), p: '/workloads/core/pods', s: '/workloads/core/services', k: '/workloads' } as Record<string, string>)[e.key] : undefined
      g = e.key === 'g' ? Date.now() : 0
      if (to) { e.preventDefault(); go(to) }
    }
    addEventListener('keydown', on)
    return () => removeEventListener('keydown', on)
  }, [])
  useEffect(() => { document.getElementById('content')?.focus({ preventScroll: true }) }, [path])
  const words = path.split('/').filter(Boolean).map(decodeURIComponent)
  const page = () => {
    if (!words.length) return <Overview node={node} />
    if (words[0] === 'nodes') return words[1] ? <ObjectPage group="core" resource="nodes" namespace="" name={words[1]} query={query} /> : <NodesPage node={node} query={query} />
    if (words[0] === 'workloads' && words.length === 1) return <AllKinds query={query} />
    if (path === '/workloads/core/events') return <EventsPage query={query} />
    if (words[0] === 'workloads' && words.length === 3) return <ListPage key={path} group={words[1]!} resource={words[2]!} query={query} />
    if (words[0] === 'workloads' && words.length === 5) return <ObjectPage group={words[1]!} resource={words[2]!} namespace={words[3] === '-' ? '' : words[3]!} name={words[4]!} query={query} />
    return <main><h1>There is no such page</h1><p><Link to="/">Go to the overview</Link></p></main>
  }
  const down = node.facts && !node.facts.status.microk8s.running && path !== '/'
  return <>
    <a class="skip" href="#content">Skip to the content</a>
    <header class="top">
      <button type="button" class="menu" aria-expanded={menu} aria-controls="nav" onClick={() => setMenu(!menu)}><span aria-hidden="true">☰</span><span class="hide">Menu</span></button>
      <Link to="/" class="brand">MicroK8s</Link>
      {node.facts && <Link to="/" class={`badge ${node.phase === 'stale' ? 'wait' : node.facts.status.microk8s.running ? 'good' : 'bad'}`}>{node.phase === 'stale' ? '◐ not known now' : node.facts.status.microk8s.running ? '● running' : '▲ not running'}</Link>}
      <span class="grow" />
      <span class="user" title={(session.groups ?? []).join(', ')}>{session.user}</span>
      <button type="button" class="small" aria-label={dark === 'dark' ? 'Use light colours' : 'Use dark colours'} onClick={() => setDark(theme(dark === 'dark' ? 'light' : 'dark'))}>{dark === 'dark' ? '☀' : '☾'}</button>
      <button type="button" class="small keys" aria-label="Keys" onClick={() => setHelp(true)}>?</button>
      <button type="button" class="small out" onClick={onLogout}>Log out</button>
    </header>
    <div class="frame">
      <Nav path={path} query={query} open={menu} close={() => setMenu(false)} />
      <div id="content" tabIndex={-1}>
        {down && <div class="strip" role="status"><b>▲ {node.facts!.headline}</b> What is below may be old. <Link to="/">See what this node knows</Link></div>}
        {page()}
      </div>
    </div>
    {help && <Dialog title="Keys" onClose={() => setHelp(false)}><dl class="facts">
      <dt><kbd>/</kbd></dt><dd>search in a list</dd><dt><kbd>↑</kbd> <kbd>↓</kbd> <kbd>Enter</kbd></dt><dd>go through a list, open a row</dd>
      <dt><kbd>g</kbd> then <kbd>o</kbd> <kbd>n</kbd> <kbd>d</kbd> <kbd>p</kbd> <kbd>s</kbd> <kbd>k</kbd></dt><dd>overview, nodes, deployments, pods, services, all kinds</dd>
      <dt><kbd>Esc</kbd></dt><dd>close a dialog</dd><dt><kbd>?</kbd></dt><dd>this list</dd></dl>
      <p><a href="/assets/licences.txt">Licences of what this page is made of</a></p></Dialog>}
  </>
}

function App() {
  const [state, set] = useState<{ session?: Session; code?: boolean; why?: string } | null>(null)
  const enter = (s: Session) => {
    setSession(s, () => { setSession(null, () => {}); set({ code: s.own, why: 'Your login has ended. Log in again.' }) })
    set({ session: s })
  }
  useEffect(() => {
    fetch('/api/session', { credentials: 'same-origin', cache: 'no-store' }).then(async (r) => {
      const body = await r.json()
      if (r.ok) enter(body)
      else set({ code: body.loginCode })
    }, () => set({ why: 'The console’s server does not answer: is microk8s dashboard-proxy still running?' }))
  }, [])
  if (!state) return <p class="state" role="status">Loading …</p>
  if (!state.session) return <Login code={!!state.code} why={state.why ?? ''} onLogin={enter} />
  const out = async () => {
    const s = state.session!
    // What the page still asks for ends before the session does, or it would be refused.
    set(null)
    await new Promise((done) => setTimeout(done))
    await fetch('/api/logout', { method: 'POST', headers: { 'X-CSRF-Token': s.csrf }, credentials: 'same-origin' }).catch(() => {})
    setSession(null, () => {})
    set({ code: s.own || !!state.code })
  }
  return <Frame key={state.session.csrf} session={state.session} onLogout={() => void out()} />
}
render(<App />, document.getElementById('app')!)
