// A picture of the datastore's members: who leads, who lives, which role each has.
import type { Facts } from './api'
import { Badge } from './ui'

export function Members({ members, small }: { members: NonNullable<Facts['members']>; small?: boolean }) {
  const w = 420, n = members.length, h = n === 1 ? 76 : small ? (n > 3 ? 210 : 150) : 230
  const at = (i: number) => n === 1 ? { x: w / 2, y: 24 } : { x: w / 2 + Math.cos(2 * Math.PI * i / n - Math.PI / 2) * (w / 2 - 90), y: h / 2 + Math.sin(2 * Math.PI * i / n - Math.PI / 2) * (h / 2 - 42) }
  const leader = members.findIndex((m) => m.leader)
  const words = members.map((m) => `${m.address}: ${m.role}${m.leader ? ', leader' : ''}, ${m.online ? 'answers' : 'does not answer'}`).join('; ')
  return <>
    <svg class="members" viewBox={`0 0 ${w} ${h}`} role="img" aria-label={`Members of the datastore. ${words}`}>
      {leader >= 0 && members.map((m, i) => i !== leader && <line x1={at(leader).x} y1={at(leader).y} x2={at(i).x} y2={at(i).y} class={m.online ? 'on' : 'off'} />)}
      {members.map((m, i) => <g transform={`translate(${at(i).x} ${at(i).y})`}>
        <circle r={m.role === 'voter' ? 18 : 13} class={(m.online ? 'alive ' : 'silent ') + (m.role === 'voter' ? 'voter' : 'other')} />
        {m.leader && <path d="M-9 3 -9 -6 -4.5 -1 0 -8 4.5 -1 9 -6 9 3Z" class="crown" />}
        {!m.online && <path d="M-7 -7 7 7M7 -7 -7 7" class="cross" />}
        <text y={34} text-anchor="middle">{m.address.replace(/:\d+$/, '')}</text>
      </g>)}
    </svg>
    <ul class="plain">{members.map((m) => <li><span>{m.address} <small>{m.role}{m.leader ? ', leader' : ''}{m.self ? ', this node' : ''}{m.diskFull ? ', its disk is full' : ''}</small></span><Badge word={m.online ? 'answers' : 'silent'} tone={m.online ? 'good' : 'bad'} /></li>)}</ul>
  </>
}
