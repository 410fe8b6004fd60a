#!/usr/bin/env bash
# Install the wheels of a folder as a user would, outside the checkout and without a compiler, and train with each.
#
# usage: bash scripts/check_wheels.sh [dist]
#
# environment: PYTHON (python3) makes the environment; TORCH (torch torchvision) and DALI (nvidia-dali-cuda130==2.4.0)
# are what is installed beside the wheels.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
dist=$(cd "${1:-dist}" && pwd)
platform=$(echo "$dist"/mcl_pretrain-*-manylinux_*_x86_64.whl)
pure=$(echo "$dist"/mcl_pretrain-*-py3-none-any.whl)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
mkdir photos
for class in bird building; do cp -r "$root/data/photos/train/$class" photos; done

alone() { env -u LD_LIBRARY_PATH -u CUDA_HOME -u PYTHONPATH PATH="$work/venv/bin" "$@"; }
pip() { alone python -m pip --disable-pip-version-check -q "$@"; }
fail() {
  printf 'check_wheels: %s\n' "$@" >&2
  exit 1
}

# What a command says must contain each line.
says() {
  local output
  output=$(cat)
  echo "$output"
  for line in "$@"; do [[ $output == *"$line"* ]] || fail "not said: $line"; done
}

train() {
  alone mcl pretrain mcl_r18_fpn_demo name="$1" data.root=photos trainer.epochs=1 trainer.device=cpu \
    'evaluation.at_end=[]' 2>&1 | says "${@:2}"
}

doctor() { alone mcl doctor | says "Ready to run." "$@"; }
