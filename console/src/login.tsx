// Login by a token or a kubeconfig.
import { useState } from 'preact/hooks'
import { send, type ApiError, type Session } from './api'
import { Code, useTitle } from './ui'

export function Login({ code, why, onLogin }: { code: boolean; why: string; onLogin: (s: Session) => void }) {
  useTitle('Log in')
  const [token, setToken] = useState(''), [file, setFile] = useState(''), [config, setConfig] = useState(''), [bad, setBad] = useState(why), [busy, setBusy] = useState(false)
  const login = async (body: { token?: string; kubeconfig?: string }) => {
    setBusy(true); setBad('')
    try { onLogin(await send<Session>('POST', '/api/login', body)) } catch (e) { setBad((e as ApiError).message) } finally { setBusy(false) }
  }
  return <main class="login">
    <h1>MicroK8s</h1>
    <form class="card" onSubmit={(e) => { e.preventDefault(); void login(config ? { kubeconfig: config } : { token }) }}>
      <h2>Log in</h2>
      {bad && <p class="state error" role="alert">{bad}</p>}
      <label class="field">Token <input type="password" name="token" autocomplete="off" spellcheck={false} autofocus value={token} onInput={(e) => { setToken(e.currentTarget.value); setConfig(''); setFile('') }} /></label>
      <label class="field">or a kubeconfig <input type="file" onChange={(e) => {
        const f = e.currentTarget.files?.[0]
        if (f) void f.text().then((t) => { setConfig(t); setFile(f.name); setToken('') })
      }} /></label>
      {file && <p><small>{file}: its token or client certificate is used, nothing else of it.</small></p>}
      <footer><button class="primary" disabled={busy || (!token.trim() && !config)} aria-busy={busy}>Log in</button></footer>
    </form>
    <section class="hint">
      {code ? <p>The command that serves this page has printed a token: it has the rights of the person who started the command.</p> : <p>An administrator makes a kubeconfig for you: <Code text="microk8s config --user NAME --role view" /></p>}
      <p>Everything here is done with your own rights.</p>
    </section>
  </main>
}
