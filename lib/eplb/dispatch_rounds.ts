// From shares to the table that dispatch applies: which replica of every expert a token is sent to, in rounds.
import { Arguments } from '../arguments.js';
import { MoeError } from '../errors.js';
import { Placement } from '../placement/placement.js';

const check = new Arguments('dispatch_rounds');

/** Shares of another placement would send tokens to slots of other experts. */
function checkShares(placement: Placement, shares: Float64Array): void {
  const refuse = (message: string): never => {
    throw new MoeError('ERR_MOE_INVALID_ARG', message, { op: 'dispatch_rounds', arg: 'shares' });
  };
  if (check.numbers('shares', shares).length !== placement.physicalExperts)
    refuse(`expected shares of ${placement.physicalExperts} physical experts but received ${shares.length}`);
  for (let expert = 0; expert < placement.experts; expert++) {
    let sum = 0;
    for (const id of placement.replicasOf(expert)) sum += shares[id]! >= 0 ? shares[id]! : Number.NaN;
    if (!(Math.abs(sum - 1) < 1e-6))
      refuse(`expected shares >= 0 that sum to 1 for expert ${expert} but received a sum of ${sum}`);
  }
}

/**
 * i32[rounds * experts]: the dispatch table idMap of one source rank; token t uses row t mod rounds. Every replica
 * gets the rounds nearest to its share (largest remainders), spread evenly over the table; the replica on the rank
 * itself takes the first of its rounds before the others, and ranks start the others at different places.
 */
export function dispatchRounds(
  placement: Placement,
  shares: Float64Array,
  rank: number,
  rounds: number,
): Int32Array {
  check.instance('placement', placement, Placement);
  check.integer('rounds', rounds, 1, 2 ** 31 - 1);
  check.integer('rank', rank, 0, placement.devices - 1);
  checkShares(placement, shares);
  const { experts } = placement;
  const map = new Int32Array(rounds * experts);
  for (let expert = 0; expert < experts; expert++) {
    const replicas = Array.from(placement.replicasOf(expert));
    const home = replicas.findIndex((id) => placement.deviceOfPhysical(id) === rank);
    const turn = replicas.map((_, index) => replicas[(index + (home >= 0 ? home : rank)) % replicas.length]!);
    const exact = turn.map((id) => shares[id]! * rounds);
    const given = exact.map(Math.floor);
    const missing = rounds - given.reduce((sum, value) => sum + value, 0);
    const byRemainder = exact
      .map((_, index) => index)
      .sort((left, right) => exact[right]! - given[right]! - (exact[left]! - given[left]!) || left - right);
    for (const index of byRemainder.slice(0, missing)) given[index]!++;
    // Evenly spread: the replica furthest behind its share is next
    const done = given.map(() => 0);
    for (let round = 0; round < rounds; round++) {
      let next = -1;
      let furthest = Number.NEGATIVE_INFINITY;
      for (let index = 0; index < turn.length; index++) {
        if (done[index]! >= given[index]!) continue;
        const behind =
          (given[index]! * (round + 1)) / rounds -
          done[index]! +
          (round === 0 && index === 0 && home >= 0 ? 1 : 0);
        if (behind > furthest + 1e-12) {
          furthest = behind;
          next = index;
        }
      }
      done[next]!++;
      map[round * experts + expert] = turn[next]!;
    }
  }
  return map;
}
