#!/usr/bin/env bash
# Install MMDetection and mmpretrain for PYTHON, without changing its torch. `mcl install-mmdet` runs this script.
#
# usage: bash install.sh PYTHON [openmmlab|onedl]
#
# mmcv has no wheel for a current torch, and requests C++17, while torch's headers need C++20. So this script builds it
# from its source on PyPI, with a compiler wrapper that replaces the option: up to 8 minutes on two cores. The wheel is
# kept in $XDG_CACHE_HOME/mcl/mmcv (~/.cache) for other environments with the same torch.
#
# environment (defaults): CXX (g++), MAX_JOBS (as cores and memory allow), FORCE_CUDA=1 to compile mmcv's CUDA operators
# without a GPU (with one, they are always compiled), TORCH_CUDA_ARCH_LIST (architecture of the GPU), CUDA_HOME.
set -euo pipefail

GIB_PER_JOB=2  # a compilation with torch's headers

fail() {
  printf 'mcl install-mmdet: %s\n' "$@" >&2
  exit 1
}

[ $# -ge 1 ] || fail "usage: install.sh PYTHON [openmmlab|onedl]"
python=$1
here=$(cd "$(dirname "$0")" && pwd)
list=$here/${2:-openmmlab}.txt
[ -r "$list" ] || fail "unknown fork $2; choose openmmlab or onedl"
mmcv=$(grep -E '^(onedl-)?mmcv==' "$list")
package=${mmcv%==*}
wheel=${package//-/_}-${mmcv#*==}
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# What a compiled mmcv depends on, e.g. torch2.14.1+cu130-cp311-cpu, or ...-cuda9.0 for a GPU of that capability.
key=$("$python" - <<'END'
import os, sys, torch

device = "cpu"
if torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1":
    seen = torch.cuda.is_available() and "{}.{}".format(*torch.cuda.get_device_capability())
    device = "cuda" + (os.environ.get("TORCH_CUDA_ARCH_LIST") or seen or "").replace(";", "_").replace(" ", "_")
print(f"torch{torch.__version__}-cp{sys.version_info.major}{sys.version_info.minor}-{device}")
END
) || fail "$python has no torch; install mcl first"
[[ $key != *-cuda ]] || fail "FORCE_CUDA=1, but there is no GPU: name the architectures to compile operators for," \
  "e.g. TORCH_CUDA_ARCH_LIST='8.0;9.0' for A100 and H100."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mcl/mmcv/$key

# Writes the wrapper $1 of the compiler $2, which replaces C++17 by C++20 and adds the arguments $3.
compiler() {
  printf '#!/usr/bin/env bash\nexec %s "${@/#-std=c++17/-std=c++20}" %s\n' "$2" "$3" >"$work/$1"
  chmod +x "$work/$1"
}

# The places where torch looks for nvcc.
find_nvcc() {
  local candidate
  for candidate in ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
    [ -x "$candidate" ] && echo "$candidate" && return
  done
  return 1
}

jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk -v each=$GIB_PER_JOB '/MemAvailable/ { print int($2 / 1048576 / each) }' /proc/meminfo)
  echo $((memory < 1 ? 1 : memory < cores ? memory : cores))
}

build() {
  local log=$cache/build.log
  command -v ${CXX:-g++} >/dev/null || fail "no C++ compiler (${CXX:-g++}); install one: apt install g++"
  local cuda=""
  if [[ $key == *-cuda* ]] && ! cuda=$(find_nvcc); then
    fail "mmcv's operators for the GPU need the CUDA compiler, nvcc, which is not in CUDA_HOME, PATH or /usr/local/cuda." \
      "Install the toolkit of torch's CUDA version, or build for CPUs only: CUDA_VISIBLE_DEVICES= mcl install-mmdet."
  fi
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/.building.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  compiler cxx "${CXX:-g++}" -g0  # Python's own build flags may contain -g, which more than doubles the time
  [ -z "$cuda" ] || compiler nvcc "$cuda" ""
  echo "building $mmcv for $key: up to 8 minutes on two cores; the compiler's output is in $log"
  # pip's own cache would offer a wheel that was built for another torch.
  if ! CXX=$work/cxx PYTORCH_NVCC=$work/nvcc MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(jobs)} \
    pip wheel --verbose --no-cache-dir --no-deps --no-build-isolation --no-binary "$package" -w "$work" "$mmcv" \
    >"$log" 2>&1; then
    grep -E -m 5 '(error:|Error:|ERROR|Killed|No space left)' "$log" >&2 || tail -n 5 "$log" >&2
    fail "$mmcv could not be built for $key. The first errors are above, the whole log is in $log." \
      "'Killed': too little memory, set MAX_JOBS=1. 'could not find': PyPI cannot be reached." \
      "An error in torch's headers: install g++ 11 or later, or name another compiler with CXX."
  fi
  mv "$work/$wheel"-*.whl "$cache"
}

others=$(grep -vE '^#|mmcv==' "$list")
pip install --quiet --no-deps -r "$here/packages.txt" $others
ls "$cache/$wheel"-*.whl >/dev/null 2>&1 || build
pip install --quiet --no-deps --force-reinstall "$cache/$wheel"-*.whl
"$python" -W ignore "$here/check.py" || fail "MMDetection was installed, but does not work: see above." \
  "If mmcv._ext cannot be loaded, remove $cache and try again."
