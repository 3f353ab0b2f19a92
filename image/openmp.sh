# One OpenMP for torch and numba. numba's threads ask the loader for GCC's runtime by its full name; torch brings a copy under
# another, and two runtimes would each start a thread for every core. So that name leads to torch's copy where it brings one,
# else to Debian's. Ends with an error where the threads cannot be loaded, or not on the runtime that torch uses.
set -eu
torch=$(python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parent)')
copy=$(find "$torch/lib" -name 'libgomp*.so.1*' | head -n 1)
if [ -n "$copy" ]; then
    ln -sf "$copy" "/usr/lib/$(uname -m)-linux-gnu/libgomp.so.1.0.0"
else
    apt-get update
    apt-get install --yes --no-install-recommends libgomp1
    rm -rf /var/lib/apt/lists/*
fi
python - <<'PYTHON'
import os
import torch
from numba.np.ufunc import omppool
files = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps") if "gomp" in line}
assert len(files) == 1, f"{omppool.__name__}: runtimes of OpenMP: {sorted(files)}"
print("OpenMP:", *files, "of torch", torch.__version__)
PYTHON
