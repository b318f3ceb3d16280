import { describe, expect, it } from 'vitest';
import { forecastOf } from '../../lib/eplb/forecast.js';
import { Loads } from '../../lib/eplb/loads.js';
import { normal, uniform } from '../../lib/eplb/random.js';

const experts = 512;

/** The forecast after windows of one layer and one step, each f64[experts]. */
function forecastAfter(windows: readonly Float64Array[], leastDecay = 0) {
  const loads = new Loads({ steps: 1, layers: 1, experts }, windows.at(-1)!);
  return forecastOf(loads, windows.slice(0, -1), leastDecay);
}

/** Logits that keep this part of themselves from window to window, spread as before. */
function wandering(windows: number, keep: number, random: () => number): Float64Array[] {
  let logits = Float64Array.from({ length: experts }, () => normal(random));
  return Array.from({ length: windows }, () => {
    logits = logits.map((value) => keep * value + Math.sqrt(1 - keep ** 2) * normal(random));
    return logits.map((value) => 1000 * Math.exp(0.4 * value));
  });
}

describe('forecast', () => {
  it('expects the last window again where there is nothing to judge by', () => {
    const windows = wandering(2, 0.5, uniform(1));
    expect(forecastAfter(windows.slice(0, 1))).toEqual({ decay: 0, keep: 1, error: 0 });
    expect(forecastAfter(windows)).toMatchObject({ keep: 1, error: 0 });
  });

  it('reckons with no change of loads that stay', () => {
    const [window] = wandering(1, 1, uniform(2));
    const { keep, error } = forecastAfter([window!, window!, window!, window!]);
    expect(keep).toBeCloseTo(1, 9);
    expect(error).toBeCloseTo(0, 9);
  });

  it('finds by how much wandering loads return, and how far off that is', () => {
    const { decay, keep, error } = forecastAfter(wandering(7, 0.8, uniform(3)));
    expect(decay).toBe(0);
    expect(keep).toBeGreaterThan(0.78);
    expect(keep).toBeLessThan(0.95);
    // Variance of a log-normal share of spread 0.4 that 0.8 of is known
    expect(error).toBeGreaterThan(0.03);
    expect(error).toBeLessThan(0.1);
  });

  it('weighs windows alike where loads come back', () => {
    const [one, two] = wandering(2, 0, uniform(4));
    expect(forecastAfter([one!, two!, one!, two!, one!, two!]).decay).toBe(1);
  });

  it('foresees nothing of loads that have nothing to do with the window before', () => {
    const random = uniform(5);
    const windows = Array.from({ length: 5 }, () =>
      Float64Array.from({ length: experts }, () => 1000 * Math.exp(1.5 * normal(random))),
    );
    expect(forecastAfter(windows)).toMatchObject({ keep: 1, error: 0 });
  });
});
