// Why a pod is not running, in one sentence, from its conditions, its containers and the scheduler's message.
import type { Obj } from './api'

export interface Event extends Obj { reason?: string; message?: string; type?: string; lastTimestamp?: string; eventTime?: string; count?: number; series?: { count: number; lastObservedTime: string }; involvedObject?: { kind: string; name: string; namespace?: string; uid?: string; apiVersion?: string }; source?: { component?: string }; reportingComponent?: string }

/** whenOf is the time at which an event happened last. */
export const whenOf = (e: Event): string => e.series?.lastObservedTime ?? e.lastTimestamp ?? e.eventTime ?? e.metadata.creationTimestamp

const tidy = (s: string | undefined) => (s ?? '').trim().replace(/\s+/g, ' ').replace(/\.$/, '')

export function why(pod: Obj, events: Event[] = []): string {
  const status = pod.status ?? {}
  if (status.phase === 'Succeeded') return ''
  const conditions: { type: string; status: string; reason?: string; message?: string }[] = status.conditions ?? []
  const ready = conditions.find((c) => c.type === 'Ready')
  if (pod.metadata.deletionTimestamp) {
    const held = pod.metadata['finalizers' as keyof typeof pod.metadata] as unknown as string[] | undefined
    return held?.length ? `It is being deleted and waits for ${held.join(', ')} to let it go.` : 'It is being deleted: its containers are told to stop.'
  }
  if (ready?.status === 'True') return ''
  if (status.phase === 'Failed' && (status.reason || status.message)) return `It has failed: ${tidy(status.message) || status.reason}.`
  const scheduled = conditions.find((c) => c.type === 'PodScheduled')
  if (scheduled && scheduled.status !== 'True') {
    if (scheduled.reason === 'SchedulingGated') return 'It waits for a scheduling gate to be taken away.'
    return `No node can take it: ${tidy(scheduled.message).replace(/^0\/\d+ nodes are available: /, '').replace(/\. (preemption|no new claims).*/, '') || 'the scheduler has not looked at it yet'}.`
  }
  const recent = [...events].sort((a, b) => whenOf(b).localeCompare(whenOf(a)))
  const said = (...reasons: string[]) => tidy(recent.find((e) => reasons.includes(e.reason ?? ''))?.message)
  const containers: { name: string; init: boolean; ready?: boolean; restartCount?: number; state?: any; lastState?: any; image?: string }[] =
    [...(status.initContainerStatuses ?? []).map((c: object) => ({ ...c, init: true })), ...(status.containerStatuses ?? []).map((c: object) => ({ ...c, init: false }))]
  const ended = (t: any) => t ? (t.reason === 'OOMKilled' ? 'it was killed because it used more memory than its limit' : t.signal ? `signal ${t.signal} ended it` : `it ended with exit code ${t.exitCode}`) + (tidy(t.message) ? ` (${tidy(t.message)})` : '') : ''
  for (const c of containers) {
    const name = `${c.init ? 'Init container' : 'Container'} ${c.name}`
    const waiting = c.state?.waiting
    switch (waiting?.reason) {
      case undefined: break
      case 'CrashLoopBackOff': return `${name} keeps failing and is started again after a pause: ${ended(c.lastState?.terminated) || 'its logs say why'}.`
      case 'ImagePullBackOff': case 'ErrImagePull': return `The image ${c.image} of ${name.toLowerCase()} cannot be pulled: ${said('Failed') || tidy(waiting.message)}.`
      case 'InvalidImageName': return `${name} has an image whose name is not valid: ${c.image}.`
      case 'CreateContainerConfigError': case 'CreateContainerError': case 'RunContainerError': return `${name} cannot be started: ${tidy(waiting.message) || said('Failed')}.`
      case 'PodInitializing': case 'ContainerCreating': {
        const held = said('FailedMount', 'FailedAttachVolume', 'FailedCreatePodSandBox', 'FailedBinding')
        if (held) return `It cannot be started yet: ${held}.`
        if (waiting.reason === 'ContainerCreating') return 'Its containers are being made.'
        break
      }
      default: return `${name} waits: ${tidy(waiting.message) || waiting.reason}.`
    }
    if (c.init && c.state?.running) return `${name} has not finished yet.`
    if (c.state?.terminated && c.state.terminated.exitCode !== 0) return `${name} has failed: ${ended(c.state.terminated)}.`
    if (!c.init && c.state?.running && !c.ready) {
      const probe = said('Unhealthy')
      return `${name} runs and is not ready: ${probe || 'its readiness probe has not succeeded yet'}.`
    }
  }
  if (!pod.spec?.nodeName) return 'The scheduler has not looked at it yet.'
  const reason = ready?.message ? tidy(ready.message) : said('FailedMount', 'FailedCreatePodSandBox', 'NodeNotReady')
  return reason ? `It is not ready: ${reason}.` : 'The kubelet has not reported on it yet.'
}
