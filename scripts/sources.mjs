// Prints the C++ sources of the given folders, or those with a certain end (folder:_avx2.cc), for binding.gyp, which
// cannot glob.
import { readdirSync } from 'node:fs';

for (const argument of process.argv.slice(2)) {
  const [folder, end = '.cc'] = argument.split(':');
  for (const file of readdirSync(folder).sort()) {
    if (file.endsWith(end)) console.log(`${folder}/${file}`);
  }
}
