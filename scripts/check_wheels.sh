#!/usr/bin/env bash
# Install the wheels of a folder as a user does, outside the checkout and without a compiler, and train with each.
#
# usage: bash scripts/check_wheels.sh [dist]
#
# environment: PYTHON (python3) creates the new environment; BESIDE are packages to install with the wheels, such as
# torch==2.11.0 torchvision==0.26.0. PyTorch and DALI come with them: 5.5 GB.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dist=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir photos
cp -r "$root"/data/photos/val/* photos

# Runs a command with only the new environment on PATH.
alone() { env -u LD_LIBRARY_PATH -u CUDA_HOME -u PYTHONPATH PATH="$work/venv/bin" "$@"; }

# Prints its input, and fails unless it contains each argument.
says() {
  local output text
  output=$(cat)
  printf '%s\n' "$output"
  for text in "$@"; do
    [[ $output == *"$text"* ]] && continue
    echo "check_wheels: not said: $text" >&2
    exit 1
  done
}

train() {
  alone mcl pretrain mcl_r18_fpn_demo output="$work/$1" data.root=photos data.val_root= trainer.epochs=1 \
    trainer.device=cpu 'evaluation.at_end=[]' 2>&1 | says "${@:2}"
}

doctor() { alone mcl doctor | says "Ready to run." "$@"; }

echo "== the wheel with operators, as in a container"
# The interpreter's own path: python3 may be a script of a version manager, which needs other programs.
PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') alone "$BASH" "$root"/docker/install.sh "$dist" "$work"/venv ${BESIDE:-}
train platform "loader: fused on cpu" "operators: mcl: region_pool, batch_norm, norms, lars_, ema_"
doctor "for CPU and CUDA (" "fused engine on CPU"
alone mcl budget mcl_r18_fpn_demo | says "loader.json"
# The dynamic loader may know libraries of a CUDA toolkit, which must not be used.
alone python - <<'END'
import re
import sys
from pathlib import Path

from dali_pipelines import pipelines
from mcl import ops

assert ops.missing == {"cpu": "", "cuda": ""}, ops.missing
assert pipelines.load_plugin() == {"cpu", "gpu"}
loaded = set(re.findall(r"\S*/lib\w*cudart\S*", Path("/proc/self/maps").read_text()))
print("loaded:", *loaded)
assert loaded
assert all(path.startswith(sys.prefix) for path in loaded)
END

echo "== the pure wheel"
alone python -m pip --disable-pip-version-check install --quiet --force-reinstall --no-deps "$dist"/mcl_pretrain-*-py3-none-any.whl
train stock "loader: stock on cpu (" "mcl's DALI plugin is not installed; " "steps are slower without mcl's CPU operators"
doctor "stock engine on CPU" "torchvision on CPU: region_pool"
alone python -m pip uninstall --quiet --yes nvidia-dali-cuda130
train torchvision "loader: torchvision on cpu (" "NVIDIA DALI is not installed; " "steps are slower"
doctor "torchvision engine on CPU"
