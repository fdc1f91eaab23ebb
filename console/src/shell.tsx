// A shell in a container: xterm.js over the exec protocol (v5.channel.k8s.io). Loaded when it is opened.
import { FitAddon } from '@xterm/addon-fit'
import { Terminal } from '@xterm/xterm'
import { useEffect, useRef, useState } from 'preact/hooks'
import { session, type Obj } from './api'

// The page's policy allows style elements that have this answer's nonce only, and the terminal makes some.
const nonce = document.querySelector<HTMLMetaElement>('meta[name=nonce]')?.content ?? ''
const make = document.createElement.bind(document) as (name: string, options?: ElementCreationOptions) => HTMLElement
document.createElement = ((name: string, options?: ElementCreationOptions) => {
  const el = make(name, options)
  if (name === 'style') el.nonce = nonce
  return el
}) as typeof document.createElement

const stdin = 0, stdout = 1, stderr = 2, failed = 3, resize = 4

export default function Shell({ pod }: { pod: Obj }) {
  const names: string[] = (pod.spec.containers ?? []).map((c: { name: string }) => c.name)
  const [container, setContainer] = useState(names[0] ?? ''), [round, again] = useState(0), [ended, setEnded] = useState('')
  const box = useRef<HTMLDivElement>(null)
  useEffect(() => {
    setEnded('')
    const term = new Terminal({ cursorBlink: true, fontSize: 14, fontFamily: 'ui-monospace, "DejaVu Sans Mono", monospace', scrollback: 5000, screenReaderMode: true, theme: { background: '#000000', foreground: '#e6e6e6' } })
    const fit = new FitAddon()
    term.loadAddon(fit)
    term.open(box.current!)
    fit.fit()
    const command = ['sh', '-c', 'TERM=xterm-256color; export TERM; command -v bash >/dev/null 2>&1 && exec bash || exec sh'].map((c) => '&command=' + encodeURIComponent(c)).join('')
    const socket = new WebSocket(`wss://${location.host}/k8s/api/v1/namespaces/${pod.metadata.namespace}/pods/${pod.metadata.name}/exec?container=${container}&stdin=true&stdout=true&tty=true${command}`,
      ['v5.channel.k8s.io', 'csrf.' + session()!.csrf])
    socket.binaryType = 'arraybuffer'
    const sendTo = (channel: number, text: string) => {
      if (socket.readyState !== WebSocket.OPEN) return
      const data = new TextEncoder().encode(text), frame = new Uint8Array(data.length + 1)
      frame[0] = channel
      frame.set(data, 1)
      socket.send(frame)
    }
    const size = () => sendTo(resize, JSON.stringify({ Width: term.cols, Height: term.rows }))
    let said = ''
    socket.onopen = () => { size(); term.focus() }
    socket.onmessage = (e) => {
      const frame = new Uint8Array(e.data as ArrayBuffer), body = frame.subarray(1)
      if (frame[0] === stdout || frame[0] === stderr) term.write(body)
      if (frame[0] === failed) {
        const text = new TextDecoder().decode(body)
        try { const s = JSON.parse(text); said = s.status === 'Success' ? 'the shell has ended' : s.message } catch { said = text }
      }
    }
    socket.onclose = () => setEnded(said || 'the connection has ended, or could not be made: the container may have no shell, or not run')
    term.onData((d) => sendTo(stdin, d))
    const sized = new ResizeObserver(() => { fit.fit(); size() })
    sized.observe(box.current!)
    return () => { sized.disconnect(); socket.onclose = null; socket.close(); term.dispose() }
  }, [container, round])
  return <section aria-label="Shell" class="shell">
    <div class="bar">
      {names.length > 1 && <label class="field">Container <select value={container} onChange={(e) => setContainer(e.currentTarget.value)}>{names.map((n) => <option value={n}>{n}</option>)}</select></label>}
      {ended && <><span class="state stale inline" role="status">{ended}</span><button type="button" onClick={() => again(round + 1)}>Open again</button></>}
      <small>Ctrl-Shift-M leaves the terminal.</small>
    </div>
    <div class="terminal" ref={box} onKeyDownCapture={(e) => {
      if (e.ctrlKey && e.shiftKey && e.key.toLowerCase() === 'm') { e.preventDefault(); e.stopPropagation(); (document.querySelector('.tab.on') as HTMLElement | null)?.focus() }
    }} />
  </section>
}
