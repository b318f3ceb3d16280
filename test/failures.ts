// What a call is to fail with: always a MoeError.
import { expect } from 'vitest';
import { MoeError } from '../lib/index.js';

export function failure(act: () => unknown): MoeError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(MoeError);
    return error as MoeError;
  }
  throw new Error('expected the call to throw');
}

export async function rejection(act: () => Promise<unknown>): Promise<MoeError> {
  try {
    await act();
  } catch (error) {
    expect(error).toBeInstanceOf(MoeError);
    return error as MoeError;
  }
  throw new Error('expected the promise to reject');
}
