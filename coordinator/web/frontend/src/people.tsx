import { useEffect, useState } from 'preact/hooks'
import { exported, get, ownerOf, type Peer, type PeerHistory } from './api'
import { ago, count, expert, short } from './format'
import type { Moment } from './past'

/** The public key or peer id in the address, as #peer=…; null without one. */
export function wanted(): string | null {
  return location.hash.startsWith('#peer=') ? decodeURIComponent(location.hash.slice(6)) : null
}

export function People({ moment, events }: { moment: Moment; events: number }) {
  const { peers, peersTotal: total, now, present } = moment
  const credits = peers.some((peer) => peer.credit && peer.credit.total > 0)
  const [who, setWho] = useState(wanted())
  const [typed, setTyped] = useState('')
  useEffect(() => {
    const changed = () => setWho(wanted())
    addEventListener('hashchange', changed)
    return () => removeEventListener('hashchange', changed)
  }, [])
  return (
    <section aria-labelledby="people">
      <h2 id="people">People</h2>
      <form onSubmit={(event) => { event.preventDefault(); location.hash = `peer=${encodeURIComponent(typed.trim())}` }}>
        <label>Find me, by peer id or public key <input value={typed} onInput={(event) => setTyped(event.currentTarget.value)} maxLength={128} spellcheck={false} /></label> <button>find</button>
      </form>
      {who && <Page who={ownerOf(who)} now={now} events={events} />}
      <div class="scroll" tabIndex={0}>
        <table>
          <thead><tr><th scope="col">peer</th>{credits && <th scope="col">credit, FLOPs</th>}<th scope="col">device</th><th scope="col">health</th><th scope="col">expert</th><th scope="col">accepted samples</th><th scope="col">results</th><th scope="col">invalid</th><th scope="col">last accepted</th></tr></thead>
          <tbody>
            {peers.map((peer) => (
              <tr key={peer.owner}>
                <td>{peer.name && <><bdi class="who" title={peer.name}>{peer.name}</bdi> </>}<a href={`#peer=${peer.owner}`}><code>{short(peer.owner)}</code></a></td>{credits && <td class="n" title={peer.credit && `${count(peer.credit.recent)} a day lately`}>{peer.credit ? count(peer.credit.total) : '–'}</td>}<td>{peer.node?.device ?? '–'}</td>
                <td class={peer.quarantined ? 'bad' : peer.node?.health === 'working' ? 'good' : ''}>{peer.quarantined ? 'quarantined' : present ? (peer.node?.health ?? 'not online') : '–'}</td>
                <td>{peer.node?.shard == null ? '–' : expert(peer.node.shard)}</td><td class="n">{count(peer.samples)}</td><td class="n">{peer.accepted}</td><td class="n">{peer.invalid}</td><td class="n">{ago(peer.last_accepted, now)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {total > peers.length && <p class="soft">{total - peers.length} more peers are not shown.</p>}
    </section>
  )
}

function Page({ who, now, events }: { who: string; now: number; events: number }) {
  const [peer, setPeer] = useState<PeerHistory | string | null>(null)
  useEffect(() => {
    let mine = true
    get<PeerHistory>(`peers/${encodeURIComponent(who)}`).then((found) => mine && setPeer(found), (problem: Error) => mine && setPeer(problem.message))
    return () => { mine = false }
  }, [who, events])
  if (peer === null) return <p class="soft">Looking for this peer…</p>
  if (typeof peer === 'string') return <p class="bad" role="alert">{peer}</p>
  const lines = [
    ...peer.points.map((each) => ({ ...each, good: !each.void, text: each.void ? 'rolled back since' : `accepted with held-out loss ${each.loss.toFixed(4)}${each.note ? `; ${each.note}` : ''}` })),
    ...peer.refused.map((each) => ({ ...each, good: false, text: `${each.verdict} at ${each.check}: ${each.text}` })),
    ...peer.superseded.map((each) => ({ ...each, good: false, text: 'another result was accepted for this epoch first; nothing is wrong with it' })),
    ...peer.audits.map((each) => ({ ...each, good: each.outcome === 'valid', text: `audit: ${each.outcome}${each.text ? `; ${each.text}` : ''}` })),
  ].sort((a, b) => b.event - a.event)
  return (
    <article class="peer" aria-label="One peer">
      <h3>{peer.name && <><bdi>{peer.name}</bdi> </>}<code>{peer.peer_id}</code> <a href="#" class="soft">close</a></h3>
      {peer.quarantined && <p class="bad">Quarantined: <span dir="auto">{peer.quarantined}</span></p>}
      <p>{count(peer.samples)} accepted samples in {peer.accepted} results; {peer.void} rolled back, {peer.invalid} invalid. {peer.node ? `Now ${peer.node.state}, ${peer.node.health}.` : 'Not online now.'}</p>
      {peer.credit && peer.credit.total > 0 && <p>Credit: {count(peer.credit.total)} FLOPs ({count(peer.credit.epochs)} of accepted epochs, {count(peer.credit.audits)} of audits and checks, {count(peer.credit.copies)} of copies kept); lately {count(peer.credit.recent)} a day.{!exported && <> <img class="badge" src={`api/v1/peers/${peer.owner}/badge.svg`} alt="The peer's badge" /> <a href={`api/v1/peers/${peer.owner}/card.svg`}>card</a></>}</p>}
      <ul class="scroll" tabIndex={0}>{lines.map((line, i) => <li key={i} class={line.good ? 'good' : ''}><span class="soft">{ago(line.time, now)}</span> expert {expert(line.shard)} epoch {line.epoch}: <span dir="auto">{line.text}</span></li>)}</ul>
    </article>
  )
}
