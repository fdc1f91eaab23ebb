// An object's YAML: changed by server-side apply, after a dry run whose difference is shown. Loaded when opened.
import { diffLines } from 'diff'
import { useEffect, useRef, useState } from 'preact/hooks'
import { ApiError, request } from './api'
import { Act, State } from './ui'

/** tidy takes out what nobody edits: who set which field, and the status. */
export function tidy(yaml: string, status: boolean): string {
  const out: string[] = []
  let skip: RegExp | null = null
  for (const line of yaml.split('\n')) {
    if (skip?.test(line)) continue
    skip = null
    if (line === '  managedFields:') { skip = /^ {2}(- | {2}|$)/; continue }
    if (!status && /^status:/.test(line)) { skip = /^( |- |$)/; continue }
    out.push(line)
  }
  return out.join('\n').trimEnd() + '\n'
}

const yamlType = { Accept: 'application/yaml' }

/** lineOf finds the line that an error of the API server is about; 0 if it names none. */
export function lineOf(message: string, text: string): number {
  const said = /line (\d+)/.exec(message)
  if (said) return Number(said[1])
  const field = /unknown field "([^"]+)"/.exec(message) ?? /(?:spec|metadata|data)\.([A-Za-z0-9.[\]]+)/.exec(message)
  const name = field?.[1]?.split('.').pop()?.replace(/\[\d+\]/, '')
  return name ? text.split('\n').findIndex((l) => l.trim().replace(/^- /, '').startsWith(name + ':')) + 1 : 0
}

function Difference({ before, after }: { before: string; after: string }) {
  const counted = /^ {2}(generation|resourceVersion): .*\n/gm // change by themselves
  const parts = diffLines(before.replace(counted, ''), after.replace(counted, ''))
  if (!parts.some((p) => p.added || p.removed)) return <p class="state empty">The API server would change nothing.</p>
  return <pre class="diff" tabIndex={0} aria-label="What changes">{parts.map((p) => {
    const lines = p.value.replace(/\n$/, '').split('\n')
    if (p.added || p.removed) return lines.map((l) => <span class={p.added ? 'plus' : 'minus'}>{p.added ? '+ ' : '- '}{l}{'\n'}</span>)
    if (lines.length <= 7) return lines.map((l) => <span>{'  ' + l + '\n'}</span>)
    return <>{lines.slice(0, 3).map((l) => <span>{'  ' + l + '\n'}</span>)}<span class="gap">{`  … ${lines.length - 6} lines as they are …\n`}</span>{lines.slice(-3).map((l) => <span>{'  ' + l + '\n'}</span>)}</>
  })}</pre>
}

export default function Edit({ path, mayChange, version }: { path: string; mayChange: boolean; version: string }) {
  const [base, setBase] = useState<string | null>(null), [text, setText] = useState(''), [bad, setBad] = useState('')
  const [wrong, setWrong] = useState<{ line: number; message: string; conflict: boolean } | null>(null)
  const [planned, setPlanned] = useState<{ after: string; kept: boolean } | null>(null), [done, setDone] = useState('')
  const [replace, setReplace] = useState(false), [force, setForce] = useState(false)
  const area = useRef<HTMLTextAreaElement>(null), gutter = useRef<HTMLPreElement>(null)
  const load = async () => {
    const t = tidy(await (await request(path, { headers: yamlType })).text(), !mayChange)
    setBase(t); setText(t); setPlanned(null); setWrong(null)
  }
  useEffect(() => { load().catch((e: Error) => setBad(e.message)) }, [path, mayChange])
  const touched = base !== null && text !== base
  // While nothing was changed here, the text follows the object.
  useEffect(() => { if (base !== null && !touched) load().catch(() => {}) }, [version])

  const apply = async (dry: boolean) => {
    setWrong(null); setDone('')
    const q = `?fieldManager=microk8s-console&fieldValidation=Strict${dry ? '&dryRun=All' : ''}`
    try {
      const resp = replace
        ? await request(path + q, { method: 'PUT', body: text, headers: { ...yamlType, 'Content-Type': 'application/yaml' } })
        : await request(path + q + (force ? '&force=true' : ''), { method: 'PATCH', body: text, headers: { ...yamlType, 'Content-Type': 'application/apply-patch+yaml' } })
      const after = tidy(await resp.text(), false)
      if (dry) {
        // Lines that were deleted here and are there all the same belong to other managers.
        const gone = new Set(diffLines(base!, text).filter((p) => p.removed).flatMap((p) => p.value.split('\n')).filter((l) => l.trim()))
        const kept = !replace && diffLines(text, after).some((p) => p.added && p.value.split('\n').some((l) => gone.has(l)))
        setPlanned({ after, kept })
      } else {
        setPlanned(null); setBase(after); setText(after); setDone('It is applied.'); setForce(false); setReplace(false)
      }
    } catch (e) {
      const err = e as ApiError
      setPlanned(null)
      const line = lineOf(err.message, text)
      setWrong({ line, message: err.message, conflict: err.status === 409 })
      if (line && area.current) {
        const rows = text.split('\n'), from = rows.slice(0, line - 1).join('\n').length + (line > 1 ? 1 : 0)
        area.current.focus()
        area.current.scrollTop = Math.max(0, line - 6) * area.current.scrollHeight / (rows.length + 1)
        area.current.setSelectionRange(from, from + (rows[line - 1]?.length ?? 0))
      }
    }
  }
  if (bad) return <State live={{ phase: 'error', message: bad }} what="the YAML" now={0} />
  if (base === null) return <State live={{ phase: 'loading' }} what="the YAML" now={0} />
  const rows = text.split('\n').length
  return <section aria-label="YAML" class="edit">
    {mayChange && <div class="bar">
      <Act label={planned ? 'Apply this' : 'Show what changes'} kind="primary" disabled={!touched} run={() => apply(!planned)} />
      <button type="button" disabled={!touched} onClick={() => { setText(base); setPlanned(null); setWrong(null); setForce(false); setReplace(false) }}>Undo</button>
      <button type="button" onClick={() => void load().catch((e: Error) => setBad(e.message))}>Load again</button>
      {force && <span class="badge wait">takes fields over from other managers</span>}{replace && <span class="badge wait">replaces the whole object</span>}
      {done && <span role="status" class="badge good">{done}</span>}
    </div>}
    {wrong && <div class="state error" role="alert"><b>The API server refuses this{wrong.line ? `, line ${wrong.line}` : ''}.</b> {wrong.message}
      {wrong.conflict && !force && !replace && <> <button type="button" onClick={() => { setForce(true); setWrong(null) }}>Take these fields over</button></>}</div>}
    {planned && <><h3>What changes</h3><Difference before={base} after={planned.after} />
      {planned.kept && <p class="state stale">Some lines that you deleted stay, because others have set them. <button type="button" onClick={() => { setReplace(true); setPlanned(null) }}>Replace the object instead</button></p>}</>}
    <div class="editor">
      <pre ref={gutter} class="gutter" aria-hidden="true">{Array.from({ length: rows }, (_, i) => <span class={wrong?.line === i + 1 ? 'bad' : ''}>{i + 1}{'\n'}</span>)}</pre>
      <textarea ref={area} value={text} readOnly={!mayChange} spellcheck={false} wrap="off" rows={Math.min(Math.max(rows + 1, 12), 40)} aria-label="YAML of the object" aria-invalid={!!wrong}
        onInput={(e) => { setText(e.currentTarget.value); setPlanned(null); setDone('') }} onScroll={(e) => { if (gutter.current) gutter.current.scrollTop = e.currentTarget.scrollTop }} />
    </div>
  </section>
}
