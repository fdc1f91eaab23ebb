// A table of any number of rows, of which only those in view are in the document.
import type { ComponentChildren } from 'preact'
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from 'preact/hooks'
import { go } from './ui'

export interface GridColumn<T> {
  name: string
  /** width as a track of a CSS grid. */
  width: string
  cell: (row: T) => ComponentChildren
  sort?: (row: T) => string | number
  /** least is the width of the table, in pixels, below which the column is left out. */
  least?: number
}

const height = 38 // of a row, in CSS pixels; style.css has it too

export function Grid<T>({ label, columns, rows, id, link, sorted, onSort }: {
  label: string; columns: GridColumn<T>[]; rows: T[]; id: (row: T) => string; link?: (row: T) => string
  sorted: string; onSort: (s: string) => void
}) {
  const box = useRef<HTMLDivElement>(null)
  const [view, setView] = useState({ top: 0, height: 600, width: 1000 })
  useLayoutEffect(() => {
    const el = box.current!
    const look = () => setView((v) => {
      const n = { top: el.scrollTop, height: el.clientHeight, width: el.clientWidth }
      return n.top === v.top && n.height === v.height && n.width === v.width ? v : n
    })
    look()
    const sized = new ResizeObserver(look)
    sized.observe(el)
    let asked = 0
    const scrolled = () => { if (!asked) asked = requestAnimationFrame(() => { asked = 0; look() }) }
    el.addEventListener('scroll', scrolled, { passive: true })
    return () => { sized.disconnect(); cancelAnimationFrame(asked); el.removeEventListener('scroll', scrolled) }
  }, [])

  const shown = columns.filter((c) => !c.least || view.width >= c.least)
  const down = sorted.startsWith('-'), by = columns.find((c) => c.name === sorted.replace(/^-/, ''))
  const ordered = useMemo(() => {
    if (!by?.sort) return rows
    const keyed = rows.map((r) => [by.sort!(r), r] as const)
    keyed.sort(([a], [b]) => (typeof a === 'number' && typeof b === 'number' ? a - b : String(a) < String(b) ? -1 : String(a) > String(b) ? 1 : 0) * (down ? -1 : 1))
    return keyed.map(([, r]) => r)
  }, [rows, by?.name, down])

  const first = Math.max(0, Math.floor(view.top / height) - 8)
  const last = Math.min(ordered.length, Math.ceil((view.top + view.height) / height) + 8)
  const tracks = shown.map((c) => c.width).join(' ')
  useEffect(() => { if (box.current && box.current.scrollTop > ordered.length * height) box.current.scrollTop = 0 }, [ordered.length])

  // Arrow keys go from row to row, also to those that are not in the document yet.
  const onKeyDown = (e: KeyboardEvent) => {
    const step = e.key === 'ArrowDown' ? 1 : e.key === 'ArrowUp' ? -1 : 0
    const row = (document.activeElement as HTMLElement | null)?.closest<HTMLElement>('[data-index]')
    if (!step) return
    e.preventDefault()
    const to = row ? Math.min(ordered.length - 1, Math.max(0, Number(row.dataset.index) + step)) : first
    const el = box.current!
    if (to * height < el.scrollTop) el.scrollTop = to * height
    else if ((to + 2) * height > el.scrollTop + el.clientHeight) el.scrollTop = (to + 2) * height - el.clientHeight
    requestAnimationFrame(() => requestAnimationFrame(() => el.querySelector<HTMLElement>(`[data-index="${to}"] a`)?.focus({ preventScroll: true })))
  }

  return <div class="grid" ref={box} role="table" aria-label={label} aria-rowcount={ordered.length + 1} tabIndex={0} onKeyDown={onKeyDown}>
    <div class="head" role="rowgroup"><div class="tr" role="row" aria-rowindex={1} style={{ gridTemplateColumns: tracks }}>
      {shown.map((c) => <div role="columnheader" class="th" aria-sort={by === c ? (down ? 'descending' : 'ascending') : 'none'}>
        {c.sort ? <button type="button" onClick={() => onSort(by === c && !down ? '-' + c.name : c.name)}>{c.name}<span aria-hidden="true">{by === c ? (down ? ' ▾' : ' ▴') : ''}</span></button> : c.name}
      </div>)}
    </div></div>
    <div class="body" role="rowgroup" style={{ height: `${ordered.length * height}px` }}>
      {ordered.slice(first, last).map((r, i) => {
        const to = link?.(r)
        return <div class="tr" role="row" key={id(r)} data-index={first + i} aria-rowindex={first + i + 2}
          style={{ gridTemplateColumns: tracks, transform: `translateY(${(first + i) * height}px)` }}
          onClick={(e) => { if (to && !(e.target as HTMLElement).closest('a,button') && !getSelection()?.toString()) go(to) }}>
          {shown.map((c, n) => <div role="cell" class="td">{n === 0 && to ? <a href={to} onClick={(e) => { if (!e.metaKey && !e.ctrlKey && !e.shiftKey) { e.preventDefault(); go(to) } }}>{c.cell(r)}</a> : c.cell(r)}</div>)}
        </div>
      })}
    </div>
  </div>
}
