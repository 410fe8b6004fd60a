#!/usr/bin/env bash
# Install mcl with DALI into a new environment. docker/Dockerfile and scripts/check_wheels.sh share these steps.
#
# usage: bash docker/install.sh WHEELS VENV [PACKAGE...]
#
# WHEELS is the folder that make wheels fills, VENV the environment to create; PACKAGEs are installed with mcl.
# environment: PYTHON (python3) creates VENV; MMDET=1 installs MMDetection as well, which needs g++ and nvcc.
set -euo pipefail

wheel=$(echo "$1"/mcl_pretrain-*-manylinux_*_x86_64.whl)
venv=$2
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

"${PYTHON:-python3}" -m venv "$venv"
pip install --quiet "$wheel[dali-cu13]" "${@:3}"
pip check
if [[ ${MMDET:-0} == 1 ]]; then
  "$venv/bin/mcl" install-mmdet
fi
