// Logs of a pod, followed.
import { useEffect, useMemo, useRef, useState } from 'preact/hooks'
import { lines, request, type ApiError, type Obj } from './api'

const most = 5000 // lines that are kept

export function Logs({ pod }: { pod: Obj }) {
  const all: { name: string; group: string }[] = [
    ...(pod.spec.containers ?? []).map((c: { name: string }) => ({ name: c.name, group: 'Containers' })),
    ...(pod.spec.initContainers ?? []).map((c: { name: string }) => ({ name: c.name, group: 'Init containers' })),
    ...(pod.spec.ephemeralContainers ?? []).map((c: { name: string }) => ({ name: c.name, group: 'Ephemeral containers' })),
  ]
  const [container, setContainer] = useState<string>(pod.metadata.annotations?.['kubectl.kubernetes.io/default-container'] ?? all[0]?.name ?? '')
  const [previous, setPrevious] = useState(false), [times, setTimes] = useState(false), [wrap, setWrap] = useState(true)
  const [search, setSearch] = useState(''), [text, setText] = useState<string[]>([]), [state, setState] = useState('')
  const box = useRef<HTMLDivElement>(null), pinned = useRef(true)
  const path = `/k8s/api/v1/namespaces/${pod.metadata.namespace}/pods/${pod.metadata.name}/log?container=${container}${previous ? '&previous=true' : ''}${times ? '&timestamps=true' : ''}`

  useEffect(() => {
    const stop = new AbortController()
    let kept: string[] = [], timer = 0
    setText([]); setState('loading …')
    const show = () => { if (!timer) timer = window.setTimeout(() => { timer = 0; setText([...kept]) }, 100) }
    lines(path + '&tailLines=1000' + (previous ? '' : '&follow=true'), stop.signal, (line) => {
      kept.push(line)
      if (kept.length > most * 1.2) kept = kept.slice(-most)
      show()
    }, '*/*', () => setState(previous ? 'of the container before' : 'following'))
      .then(() => setState(previous ? 'of the container before' : 'the container has ended'), (e: ApiError) => { if (!stop.signal.aborted) setState(e.message) })
    return () => { stop.abort(); clearTimeout(timer) }
  }, [path, pod.status?.containerStatuses?.find((c: { name: string; containerID?: string }) => c.name === container)?.containerID])

  const shown = useMemo(() => search ? text.filter((l) => l.toLowerCase().includes(search.toLowerCase())) : text, [text, search])
  useEffect(() => { const el = box.current; if (el && pinned.current) el.scrollTop = el.scrollHeight }, [shown, wrap])

  const download = async () => {
    const blob = await (await request(path, { headers: { Accept: '*/*' } })).blob()
    const a = document.createElement('a')
    a.href = URL.createObjectURL(blob)
    a.download = `${pod.metadata.namespace}_${pod.metadata.name}_${container}${previous ? '_previous' : ''}.log`
    a.click()
    setTimeout(() => URL.revokeObjectURL(a.href), 10000)
  }
  return <section aria-label="Logs" class="logs">
    <div class="bar">
      {all.length > 1 && <label class="field">Container <select value={container} onChange={(e) => setContainer(e.currentTarget.value)}>
        {[...new Set(all.map((c) => c.group))].map((g) => <optgroup label={g}>{all.filter((c) => c.group === g).map((c) => <option value={c.name}>{c.name}</option>)}</optgroup>)}
      </select></label>}
      <label class="check"><input type="checkbox" checked={previous} onChange={(e) => setPrevious(e.currentTarget.checked)} /> Previous</label>
      <label class="check"><input type="checkbox" checked={times} onChange={(e) => setTimes(e.currentTarget.checked)} /> Times</label>
      <label class="check"><input type="checkbox" checked={wrap} onChange={(e) => setWrap(e.currentTarget.checked)} /> Wrap</label>
      <label class="field search">Search <input type="search" value={search} onInput={(e) => setSearch(e.currentTarget.value)} /></label>
      <button type="button" onClick={() => void download().catch((e: Error) => setState(e.message))}>Download</button>
      <span class="count" role="status">{search ? `${shown.length} of ${text.length} lines, ` : ''}{state}</span>
    </div>
    <div class={wrap ? 'log wrap' : 'log'} ref={box} tabIndex={0} role="log" aria-live="off" aria-label={`Log of ${container}`} onScroll={(e) => {
      const el = e.currentTarget
      pinned.current = el.scrollTop + el.clientHeight >= el.scrollHeight - 24
    }}><pre>{shown.join('\n')}</pre></div>
  </section>
}
