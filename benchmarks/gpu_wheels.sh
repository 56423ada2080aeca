#!/bin/sh
# Collects what a GPU machine without network lacks, as wheels, for `gpu.py`:
#
#   benchmarks/gpu_wheels.sh wheels                 # here, with network
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl   # there
#   PYTHONPATH=site:. python3 benchmarks/gpu.py
#
# PYTHON_VERSION, PLATFORM and LIMIT_MB say what for: 3.12, x86_64 and 64 unless they are set. That machine is expected to
# have torch, transformers, timm, peft, lightning and torchmetrics; PACKAGES replaces the list of what it lacks.
set -eu
folder=${1:?"say where: benchmarks/gpu_wheels.sh FOLDER"}
root=$(cd "$(dirname "$0")/.." && pwd)
version=${PYTHON_VERSION:-3.12}
machine=${PLATFORM:-x86_64}
limit=${LIMIT_MB:-64}
packages=${PACKAGES:-"bitsandbytes torchao simplejpeg hydra-core omegaconf antlr4-python3-runtime"}

platforms=""
for tag in 2_28 2_27 2_24 2_17 2_34 2014 2_12 1; do
    case $tag in 2014|1) name=manylinux$tag ;; *) name=manylinux_$tag ;; esac
    platforms="$platforms --platform ${name}_$machine"
done
mkdir -p "$folder"
for package in $packages; do
    # what the lock file names in the version that is tested, anything else in the newest
    pinned=$(sed -n "s/^\($package==[^ ;]*\).*/\1/p" "$root/requirements.lock" | head -n 1)
    wanted=${pinned:-$package}
    # antlr4's runtime is published as source alone: pure Python, built here
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        $platforms --dest "$folder" "$wanted" 2>/dev/null ||
        python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$wanted" ||
        { echo "$wanted: no wheel for Python $version on $machine" >&2; exit 1; }
done
size=$(du -cm "$folder"/*.whl | tail -n 1 | cut -f 1)
ls -1s --block-size=K "$folder"/*.whl
echo "$size MB of $limit"
[ "$size" -le "$limit" ] || { echo "too large: leave some out with PACKAGES=" >&2; exit 1; }
