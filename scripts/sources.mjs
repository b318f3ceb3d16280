// Prints the C++ sources of the given folders, for binding.gyp, which cannot glob.
import { readdirSync } from 'node:fs';

for (const folder of process.argv.slice(2)) {
  for (const file of readdirSync(folder).sort()) {
    if (file.endsWith('.cc')) console.log(`${folder}/${file}`);
  }
}
