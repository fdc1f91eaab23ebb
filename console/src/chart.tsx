// Charts of usage: uPlot, loaded when the first chart is shown.
import { useEffect, useRef, useState } from 'preact/hooks'
import type uPlot from 'uplot'
import { get, type ApiError } from './api'
import { bytes, cores } from './ui'

export type Unit = 'cores' | 'bytes' | 'rate' | 'ms' | 'persecond'
const show: Record<Unit, (v: number) => string> = {
  cores: (v) => v < 10 ? `${cores(v)} cores` : `${v.toFixed(1)} cores`,
  bytes, rate: (v) => bytes(v) + '/s', ms: (v) => `${v < 10 ? v.toFixed(2) : Math.round(v)} ms`, persecond: (v) => `${v < 10 ? v.toFixed(2) : Math.round(v)}/s`,
}

export interface Samples { times: number[]; lines: Record<string, Record<string, (number | null)[]>>; problem?: string }

/** useSamples is usage that the server keeps, read again as often as it grows. */
export function useSamples(query: string | null): Samples & { bad?: string } {
  const [data, set] = useState<Samples & { bad?: string }>({ times: [], lines: {} })
  useEffect(() => {
    if (!query) return
    const stop = new AbortController()
    let timer = 0
    const read = () => {
      const again = () => { if (!stop.signal.aborted) timer = window.setTimeout(read, 15000) }
      if (document.hidden) return again()
      get<Samples>('/api/samples?' + query, stop.signal).then(set, (e: ApiError) => { if (!stop.signal.aborted) set((d) => ({ ...d, bad: e.message })) }).finally(again)
    }
    read()
    return () => { stop.abort(); clearTimeout(timer) }
  }, [query])
  return data
}

// Okabe and Ito's colours, which colour-blind people can tell apart; dashes tell lines apart without any.
const palette = { light: ['#0072b2', '#b35900', '#00795a', '#a8477f', '#56b4e9', '#d55e00', '#777777'], dark: ['#56b4e9', '#e69f00', '#2fc49b', '#e39ac4', '#f0e442', '#ff8a4c', '#b0b0b0'] }
const dashes = [[], [6, 3], [2, 3], [10, 3, 2, 3]]

export interface Line { name: string; values: (number | null)[] }

export function Chart({ title, unit, times, lines, empty }: { title: string; unit: Unit; times: number[]; lines: Line[]; empty?: string }) {
  const box = useRef<HTMLDivElement>(null), plot = useRef<uPlot | null>(null)
  const names = lines.map((l) => l.name).join('\n')
  const dark = useDark()
  const any = lines.some((l) => l.values.some((v) => v !== null))
  const data = () => [times, ...lines.map((l) => l.values)] as uPlot.AlignedData
  useEffect(() => {
    if (!any) return
    let here = true, sized: ResizeObserver | undefined
    void import('uplot').then(({ default: Plot }) => {
      if (!here || !box.current) return
      const ink = getComputedStyle(document.documentElement).getPropertyValue('--soft').trim(), grid = getComputedStyle(document.documentElement).getPropertyValue('--line').trim()
      const colours = dark === 'light' ? palette.light : palette.dark
      const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: '11px system-ui, sans-serif' }
      plot.current = new Plot({
        width: Math.max(200, box.current.clientWidth), height: 150,
        cursor: { drag: { x: true, y: false } },
        scales: { y: { range: (_u, _min, max) => [0, (max || 1) * 1.1] } },
        axes: [{ ...axis, space: 80, values: (_u, all, _i, _space, step) => all.map((v) => new Date(v * 1000).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', hour12: false, ...(step < 60 ? { second: '2-digit' } : {}) })) }, { ...axis, size: 74, values: (_u, all) => all.map((v) => show[unit](v)) }],
        series: [{ value: (_u, v) => v ? new Date(v * 1000).toLocaleTimeString([], { hour12: false }) : '–' }, ...lines.map((l, i) => ({
          label: l.name, stroke: colours[i % colours.length]!, width: 1.75, dash: dashes[Math.floor(i / colours.length) % dashes.length]!, spanGaps: false, points: { show: (u: uPlot) => u.data[0].length < 4 },
          value: (_u: uPlot, v: number | null) => v === null || v === undefined ? '–' : show[unit](v),
        }))],
      }, data(), box.current)
      sized = new ResizeObserver(() => box.current && plot.current?.setSize({ width: Math.max(200, box.current.clientWidth), height: 150 }))
      sized.observe(box.current)
    })
    return () => { here = false; sized?.disconnect(); plot.current?.destroy(); plot.current = null }
  }, [any, names, unit, dark])
  useEffect(() => { plot.current?.setData(data()) }, [times, lines])
  const latest = lines.map((l) => { const v = l.values.findLast((x) => x !== null); return v === undefined || v === null ? '' : `${l.name} ${show[unit](v)}` }).filter(Boolean).join(', ')
  return <figure class="chart"><figcaption>{title} <small>{latest || empty || 'no values yet'}</small></figcaption>
    {any && <div ref={box} role="img" aria-label={`${title} over time; now: ${latest}`} />}
  </figure>
}

function useDark() {
  const [dark, set] = useState(document.documentElement.dataset.theme)
  useEffect(() => {
    const seen = new MutationObserver(() => set(document.documentElement.dataset.theme))
    seen.observe(document.documentElement, { attributeFilter: ['data-theme'] })
    return () => seen.disconnect()
  }, [])
  return dark
}

const at = (s: Samples, name: string, what: string) => s.lines[name]?.[what] ?? []

/** Usage is the charts of one node, pod or namespace. */
export function Usage({ query, name, disk }: { query: string; name: string; disk?: boolean }) {
  const s = useSamples(query)
  if (s.bad && !s.times.length) return <p class="state forbidden">{s.bad}</p>
  const empty = s.problem ? `not measured: ${s.problem}` : 'no values yet: they are kept from when the console was started'
  return <div class="charts">
    <Chart title="CPU" unit="cores" times={s.times} lines={[{ name: 'used', values: at(s, name, 'cpu') }]} empty={empty} />
    <Chart title="Memory" unit="bytes" times={s.times} lines={[{ name: 'working set', values: at(s, name, 'memory') }]} empty={empty} />
    <Chart title="Network" unit="rate" times={s.times} lines={[{ name: 'received', values: at(s, name, 'receive') }, { name: 'sent', values: at(s, name, 'transmit') }]} empty={empty} />
    {disk && <Chart title="Disk" unit="bytes" times={s.times} lines={[{ name: 'used', values: at(s, name, 'disk') }, { name: 'capacity', values: at(s, name, 'disklimit') }]} empty={empty} />}
  </div>
}

export function ClusterCharts() {
  const s = useSamples('cluster')
  if (s.bad && !s.times.length) return <p class="state forbidden">{s.bad}</p>
  const line = (name: string, what: string) => ({ name, values: at(s, 'cluster', what) })
  const empty = s.problem ? `not measured: ${s.problem}` : 'no values yet: the first come a minute after the console was started'
  return <div class="charts">
    <Chart title="Datastore: time of a call" unit="ms" times={s.times} lines={[line('reads', 'read'), line('writes', 'write')]} empty={empty} />
    <Chart title="Datastore: calls" unit="persecond" times={s.times} lines={[line('reads', 'reads'), line('writes', 'writes')]} empty={empty} />
    <Chart title="API server: calls" unit="persecond" times={s.times} lines={[line('calls', 'requests')]} empty={empty} />
  </div>
}
