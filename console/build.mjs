// Builds the page into the folder that internal/console embeds: each file compressed, its name with a
// hash of its content, and index.html naming them. The same sources make the same bytes.
// Usage: node build.mjs OUTPUT
import { build } from 'esbuild'
import { gzipSync } from 'node:zlib'
import { mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'

const out = process.argv[2] ?? '../internal/console/page'
const result = await build({
  entryPoints: ['src/main.tsx', 'src/style.css'],
  bundle: true,
  splitting: true,
  format: 'esm',
  target: 'es2022',
  minify: true,
  charset: 'utf8',
  jsx: 'automatic',
  jsxImportSource: 'preact',
  legalComments: 'none',
  entryNames: '[name]-[hash]',
  chunkNames: '[name]-[hash]',
  outdir: 'assets',
  write: false,
  metafile: true,
})

// What is embedded of others, with its licence, as their terms want it.
const lock = JSON.parse(readFileSync('package-lock.json', 'utf8'))
const used = new Set(Object.keys(result.metafile.inputs).map((p) => /^node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(p)?.[1]).filter(Boolean))
const notices = [...used].sort().map((name) => {
  const dir = join('node_modules', name)
  const licence = readdirSync(dir).find((f) => /^licen[sc]e/i.test(f))
  if (!licence) throw new Error(`${name} has no file with its licence`)
  return `${name} ${lock.packages[dir].version} (${lock.packages[dir].license})\n\n${readFileSync(join(dir, licence), 'utf8').trim()}\n`
}).join('\n----\n\n')

for (const f of readdirSync(out)) if (f !== '.gitignore') rmSync(join(out, f), { recursive: true })
mkdirSync(join(out, 'assets'), { recursive: true })
const put = (name, data) => {
  const packed = gzipSync(data, { level: 9 })
  packed[9] = 255 // the byte that names the system
  writeFileSync(join(out, name + '.gz'), packed)
  return packed.length
}
const sizes = {}
let html = readFileSync('src/index.html', 'utf8')
for (const file of result.outputFiles) {
  const name = basename(file.path)
  sizes[name] = put('assets/' + name, file.contents)
  html = html.replace(name.startsWith('main-') && name.endsWith('.js') ? '/main.js' : name.startsWith('style-') ? '/style.css' : '\0', '/assets/' + name)
}
put('assets/licences.txt', notices)
put('index.html', html)

// The first view is what index.html names, and what that imports at once.
const first = (name) => {
  const meta = result.metafile.outputs['assets/' + name]
  return [name, ...(meta?.imports ?? []).filter((i) => i.kind === 'import-statement').flatMap((i) => first(basename(i.path)))]
}
const names = new Set(Object.keys(sizes).filter((n) => /^(main|style)-/.test(n)).flatMap(first))
const total = [...names].reduce((sum, n) => sum + sizes[n], 0)
console.log(`console: ${Object.keys(sizes).length} files, first view ${Math.ceil(total / 1024)} KiB compressed`)
if (total > 300 * 1024) throw new Error('the first view is larger than 300 KiB')
