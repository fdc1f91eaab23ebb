// Small parts that all pages share: addresses, links, states, dialogs, times and units.
import type { ComponentChildren, JSX } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import type { Live } from './api'

// Addresses ---------------------------------------------------------------------------------------

let tell: () => void = () => {}
export function go(to: string, replace = false) {
  if (to === location.pathname + location.search) return
  history[replace ? 'replaceState' : 'pushState'](null, '', to)
  tell()
}
export function useAddress() {
  const [, again] = useState(0)
  useEffect(() => {
    tell = () => again((n) => n + 1)
    addEventListener('popstate', tell)
    return () => removeEventListener('popstate', tell)
  }, [])
  return { path: location.pathname, query: new URLSearchParams(location.search) }
}
/** setQuery changes parts of the address; what is empty is taken out. */
export function setQuery(changes: Record<string, string>) {
  const q = new URLSearchParams(location.search)
  for (const [k, v] of Object.entries(changes)) if (v) q.set(k, v); else q.delete(k)
  const text = q.toString()
  go(location.pathname + (text ? '?' + text : ''), true)
}
export function Link({ to, children, ...rest }: { to: string } & Omit<JSX.HTMLAttributes<HTMLAnchorElement>, 'href'>) {
  return <a {...rest} href={to} onClick={(e) => {
    if (e.metaKey || e.ctrlKey || e.shiftKey || e.button) return
    e.preventDefault()
    go(to)
  }}>{children}</a>
}

// Times and units -----------------------------------------------------------------------------------

/** useNow is the time, again every so many milliseconds. */
export function useNow(every = 5000) {
  const [now, set] = useState(Date.now())
  useEffect(() => { const t = setInterval(() => set(Date.now()), every); return () => clearInterval(t) }, [every])
  return now
}
export function ago(when: string | number | undefined, now: number): string {
  if (!when) return '–'
  const s = Math.max(0, Math.round((now - new Date(when).getTime()) / 1000))
  if (s < 120) return `${s}s`
  if (s < 7200) return `${Math.floor(s / 60)}m`
  if (s < 172800) return `${Math.floor(s / 3600)}h`
  return `${Math.floor(s / 86400)}d`
}
export function Time({ at, now }: { at: string | number | undefined; now: number }) {
  if (!at) return <span>–</span>
  const iso = new Date(at).toISOString()
  return <time dateTime={iso} title={new Date(at).toLocaleString()}>{ago(at, now)}</time>
}
export function bytes(n: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let i = 0
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++ }
  return `${n >= 100 || i === 0 ? Math.round(n) : n.toFixed(1)} ${units[i]}`
}
export const cores = (n: number) => n < 0.1 ? `${Math.round(n * 1000)}m` : `${n.toFixed(2)}`
/** quantity reads Kubernetes’ quantities such as 500m, 2Gi. */
export function quantity(q: string | undefined): number {
  const m = /^([0-9.]+)([a-zA-Z]*)$/.exec(q ?? '')
  if (!m) return 0
  const factor: Record<string, number> = { n: 1e-9, u: 1e-6, m: 1e-3, k: 1e3, M: 1e6, G: 1e9, T: 1e12, Ki: 1024, Mi: 2 ** 20, Gi: 2 ** 30, Ti: 2 ** 40 }
  return Number(m[1]) * (factor[m[2]!] ?? 1)
}

// States ----------------------------------------------------------------------------------------------

/** State says that something is loading, old, forbidden or wrong; nothing while it is live. */
export function State({ live, what, now }: { live: Live; what: string; now: number }) {
  switch (live.phase) {
    case 'live': return null
    case 'loading': return <p class="state" role="status"><span class="spinner" aria-hidden="true" /> Loading {what} …</p>
    case 'forbidden': return <p class="state forbidden" role="status"><b>You may not see {what}.</b> {live.message} An administrator can change that: <Code text="microk8s config --user NAME --role view" /></p>
    case 'stale': return <p class="state stale" role="status"><b>{what[0]!.toUpperCase() + what.slice(1)} may be old{live.since ? `: not updated for ${ago(live.since, now)}` : ''}.</b> {live.message}</p>
    default: return <p class="state error" role="alert"><b>Cannot show {what}.</b> {live.message}</p>
  }
}
export const Empty = ({ children }: { children: ComponentChildren }) => <p class="state empty">{children}</p>

const tones: Record<string, string> = {
  Running: 'good', Ready: 'good', Active: 'good', Bound: 'good', Completed: 'done', Complete: 'done', Succeeded: 'done', True: 'good', enabled: 'good', valid: 'good', running: 'good',
  Pending: 'wait', ContainerCreating: 'wait', PodInitializing: 'wait', Terminating: 'wait', Unknown: 'wait', Released: 'wait', 'Ready,SchedulingDisabled': 'wait', starting: 'wait', stopping: 'wait',
  Failed: 'bad', Error: 'bad', NotReady: 'bad', CrashLoopBackOff: 'bad', ImagePullBackOff: 'bad', ErrImagePull: 'bad', OOMKilled: 'bad', Evicted: 'bad', Lost: 'bad', backoff: 'bad', failed: 'bad', stopped: 'bad', revoked: 'done', expired: 'done', used: 'done',
}
const marks: Record<string, string> = { good: '●', wait: '◐', bad: '▲', done: '○', plain: '' }
export function toneOf(word: string): string { return tones[word] ?? (/error|fail|back-?off|invalid|not ?ready|evict/i.test(word) ? 'bad' : /^init:|pending|creating/i.test(word) ? 'wait' : 'plain') }
/** Badge shows a state by a word, a mark and a colour, so that none is needed alone. */
export function Badge({ word, tone }: { word: string; tone?: string }) {
  const t = tone ?? toneOf(word)
  return <span class={`badge ${t}`}>{marks[t] && <span aria-hidden="true">{marks[t]} </span>}{word}</span>
}

// Actions -----------------------------------------------------------------------------------------------

export function Code({ text }: { text: string }) {
  const [done, set] = useState(false)
  return <span class="code"><code>{text}</code><button type="button" class="small" aria-label={`Copy: ${text}`} onClick={() => {
    void navigator.clipboard?.writeText(text).then(() => { set(true); setTimeout(() => set(false), 1500) })
  }}>{done ? 'Copied' : 'Copy'}</button></span>
}

/** Step shows what to do next: the commands in it can be copied. */
const command = /((?:sudo )?microk8s (?:(?:logs|enable|disable|dbctl|encryption|pod-security|remove-node) [a-z0-9](?:[\w./:-]*\w)?|[a-z][a-z-]*[a-z])(?: -{1,2}[a-z-]+(?:[ =][\w/-]*[.0-9](?:[\w./-]*\w)?)?)*)/
export function Step({ text }: { text: string }) {
  const parts = text.split(command)
  return <span>{parts.map((p, i) => i % 2 && !/^microk8s (is|has|runs|was|deployment)\b/.test(p) ? <Code text={p} /> : p)}</span>
}

export function Dialog({ title, onClose, children, wide }: { title: string; onClose: () => void; children: ComponentChildren; wide?: boolean }) {
  const ref = useRef<HTMLDialogElement>(null)
  useEffect(() => {
    const before = document.activeElement as HTMLElement | null
    ref.current?.showModal()
    return () => before?.focus?.()
  }, [])
  return <dialog ref={ref} class={wide ? 'wide' : ''} aria-labelledby="dialog-title" onClose={onClose} onCancel={onClose}>
    <header><h2 id="dialog-title">{title}</h2><button type="button" class="small" aria-label="Close" onClick={onClose}>✕</button></header>
    {children}
  </dialog>
}

/** Act is a button that does something, shows that it is at it, and what went wrong. */
export function Act({ label, run, kind, disabled }: { label: string; run: () => Promise<void>; kind?: string; disabled?: boolean }) {
  const [busy, setBusy] = useState(false), [bad, setBad] = useState('')
  const here = useRef(true)
  useEffect(() => () => { here.current = false }, [])
  return <>
    <button type="button" class={kind ?? ''} disabled={busy || disabled} aria-busy={busy} onClick={() => {
      setBusy(true); setBad('')
      run().catch((e: Error) => here.current && setBad(e.message)).finally(() => here.current && setBusy(false))
    }}>{label}</button>
    {bad && <span class="state error inline" role="alert">{bad}</span>}
  </>
}

/** Facts is a list of names with values. */
export function Facts({ rows }: { rows: [string, ComponentChildren][] }) {
  return <dl class="facts">{rows.filter(([, v]) => v !== undefined && v !== null && v !== '' && v !== false).map(([k, v]) => <><dt>{k}</dt><dd>{v}</dd></>)}</dl>
}

export function Labels({ of }: { of: Record<string, string> | undefined }) {
  const all = Object.entries(of ?? {})
  return all.length ? <span class="labels">{all.map(([k, v]) => <span class="label">{k}{v && <>=<b>{v}</b></>}</span>)}</span> : null
}

export function Tabs({ tabs, now, onChange }: { tabs: [string, string][]; now: string; onChange: (t: string) => void }) {
  return <nav class="tabs" aria-label="Parts of this page">{tabs.map(([id, label]) =>
    <button type="button" class={id === now ? 'tab on' : 'tab'} aria-current={id === now ? 'page' : undefined} onClick={() => onChange(id)}>{label}</button>)}</nav>
}
export function useTitle(title: string) { useEffect(() => { document.title = `${title} · MicroK8s` }, [title]) }
