// Drives the console in headless Chromium against a real node, as a person would, and fails with what is
// wrong. tests/console runs it; see there for what it needs.
// Usage: node page.mjs OPTIONS, JSON: {url, code, viewer, out, long, exec: [command that runs its words on the node]}
import AxeModule from 'axe-core'
import { chromium } from 'playwright-core'
import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const o = JSON.parse(process.argv[2])
mkdirSync(o.out, { recursive: true })
const profile = mkdtempSync(join(tmpdir(), 'console-'))
const context = await chromium.launchPersistentContext(profile, {
  executablePath: '/usr/bin/chromium', headless: true, ignoreHTTPSErrors: true, viewport: { width: 1280, height: 800 }, colorScheme: 'dark', acceptDownloads: true,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
})
const failures = [], said = []
let expected = false // errors of calls are expected now: the API server is down
const listen = (page) => {
  page.on('console', (m) => { if (m.type() === 'error' && !expected && !/Failed to load resource/.test(m.text())) said.push(m.text()) })
  page.on('pageerror', (e) => said.push(String(e)))
  page.on('response', (r) => { if (!expected && r.status() >= 400 && !(r.status() === 401 && r.url().endsWith('/api/session')) && !allowed.some((a) => a.test(r.request().method() + ' ' + r.status() + ' ' + r.url()))) said.push(`${r.status()} for ${r.request().method()} ${r.url()}`) })
}
let allowed = []
const kubectl = (args, input) => execFileSync(o.exec[0], [...o.exec.slice(1), 'microk8s', 'kubectl', ...args], { input, encoding: 'utf8', stdio: ['pipe', 'pipe', 'inherit'] })
const onNode = (...args) => execFileSync(o.exec[0], [...o.exec.slice(1), ...args], { encoding: 'utf8', stdio: ['pipe', 'pipe', 'inherit'] })

const page = context.pages()[0] ?? await context.newPage()
const devtools = await context.newCDPSession(page)
page.setDefaultTimeout(o.long ? 60000 : 30000)
listen(page)
const see = (text, where = page) => where.getByText(text).first().waitFor()
const open = async (path) => { await page.goto(o.url + path); await page.locator('main').first().waitFor() }

async function step(name, run) {
  const began = Date.now()
  try {
    await run()
    console.log(`ok   ${name} (${Date.now() - began} ms)`)
  } catch (e) {
    failures.push(`${name}: ${e.message}`)
    console.log(`FAIL ${name}: ${e.message}`)
    await page.screenshot({ path: join(o.out, `failed-${failures.length}.png`) }).catch(() => {})
  }
  for (const s of said.splice(0)) { failures.push(`${name}: the browser's console says: ${s}`); console.log(`FAIL ${name}: ${s}`) }
}

/** accessible fails where axe-core finds something serious. */
async function accessible(what, where = page) {
  if (!await where.evaluate(() => !!window.axe)) await devtools.send('Runtime.evaluate', { expression: AxeModule.source }) // the page's policy forbids any other way
  const found = await where.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] }))
  const bad = found.violations.filter((v) => ['serious', 'critical'].includes(v.impact))
  if (bad.length) throw new Error(`${what}: ` + bad.map((v) => `${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160) + ' ' + (n.any[0]?.message ?? '')).join(' | ')}`).join('; '))
}

/** shoot makes pictures of a page, dark and light, and narrow. */
async function shoot(name, all = o.long) {
  await page.evaluate(() => { document.getElementById('content')?.scrollTo(0, 0) })
  await page.screenshot({ path: join(o.out, `${name}-dark.png`) })
  if (!all) return
  await page.evaluate(() => { document.documentElement.dataset.theme = 'light' })
  await page.waitForTimeout(200)
  await page.screenshot({ path: join(o.out, `${name}-light.png`) })
  await accessible(name + ', light')
  await page.evaluate(() => { document.documentElement.dataset.theme = 'dark' })
  await page.setViewportSize({ width: 360, height: 720 })
  await page.waitForTimeout(200)
  const wide = await page.evaluate(() => document.documentElement.scrollWidth)
  await page.screenshot({ path: join(o.out, `${name}-narrow.png`) })
  await page.setViewportSize({ width: 1280, height: 800 })
  if (wide > 360) throw new Error(`${name} is ${wide} pixels wide on a screen of 360`)
}

const stages = await import('./stages.mjs')
await stages.run({ o, page, step, see, open, kubectl, onNode, accessible, shoot, expect: (y) => { expected = y }, allow: (...a) => { allowed = a } })

await context.close()
rmSync(profile, { recursive: true, force: true })
if (failures.length) {
  console.log(`${failures.length} failed`)
  process.exit(1)
}
