#!/usr/bin/env bash
# Run a user's whole way on a GPU, the GPU tests and all speed benchmarks, in under ten minutes and without a network.
#
#   benchmarks/gpu.sh pack [DIR]    with a network: download the wheels that a bare machine with torch lacks
#   benchmarks/gpu.sh               run all parts, the most important first
#   benchmarks/gpu.sh PART...       run these parts, such as those for which a first run had no time: see the end of this file
#
# Each part has its own time limit and fails alone; a part without its packages is skipped, with a note. The project need
# not be installed. If .whl (or $DINO_WHEELS) holds wheels, they are unpacked for this run and precede installed packages.
# Compiled kernels are in $OUT/compiled.tgz at the end; unpack it into $DINO_COMPILED, and the next run compiles nothing.
#
#   OUT               folder for gpu.txt (all output), steps.jsonl and parts.jsonl (figures), trace.json.gz, compiled.tgz [gpu-results]
#   DINO_PHOTOS       folder of photos in class folders, or of train and val folders of those; if unset, images are drawn
#   DINO_COMPILED     folder of compiled kernels from an earlier run                                              [.gpu/compiled]
#   DINO_GPU_DEVICE   `cpu` tries this script with small networks                                                 [cuda]
#   DINO_SECONDS      time limit of the whole run                                                                 [560]
set -u -o pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${DINO_WHEELS:-.whl}

if [ "${1:-}" = pack ]; then
    to=${2:-$wheels}
    for_there=(--quiet --only-binary=:all: --python-version 3.12 --implementation cp)
    for old in 28 27 17; do for_there+=(--platform "manylinux_2_${old}_x86_64"); done
    for_there+=(--platform manylinux2014_x86_64 --dest "$to")
    # pydantic brings what it needs; of the others all but themselves is there, or would bring a torch.
    "$python" -m pip download "${for_there[@]}" pydantic &&
        "$python" -m pip download "${for_there[@]}" --no-deps timm faiss-cpu pillow || exit 1
    du -sh "$to"
    echo "copy $to to the machine with the checkout; 'echo /$to/ >> .git/info/exclude' keeps it out of git"
    exit
fi

device=${DINO_GPU_DEVICE:-cuda}
out=${OUT:-gpu-results}
mkdir -p "$out" || exit 1
scratch=$(mktemp -d)
exec 3>&1 > >(tee "$out/gpu.txt") 2>&1
tee=$!
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_MODULE_LOADING=LAZY
export TORCHINDUCTOR_CACHE_DIR=$scratch/compiled TRITON_CACHE_DIR=$scratch/compiled/triton
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir "$scratch/compiled"
cp -r "${DINO_COMPILED:-.gpu/compiled}/." "$scratch/compiled" 2>/dev/null
rm -f "$out"/{steps,parts}.jsonl
end=$((SECONDS + ${DINO_SECONDS:-560}))
wanted=" $* "
summary=""

if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "$wheels"/*.whl &&
        export PYTHONPATH=$scratch/site:$PYTHONPATH || echo "the wheels in $wheels do not fit this Python, see above"
fi

# Print the named packages that are missing.
missing() {
    "$python" -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' "$@"
}

# part NAME SECONDS "PACKAGES" COMMAND...: run it, with its standard output in $to if that is set.
part() {
    local name=$1 seconds=$2 needs=$3 left=$((end - SECONDS)) lacks began=$SECONDS code script
    shift 3
    case $wanted in "  " | *" $name "*) ;; *) return ;; esac
    printf '\n==== %s: %s\n' "$name" "$*"
    # shellcheck disable=SC2086
    lacks=$(missing torch $needs)
    for script in "$@"; do
        case $script in benchmarks/*.py) [ -f "$script" ] || lacks="$script $lacks" ;; esac
    done
    if [ -n "${lacks// /}" ]; then
        note "$name: skipped, $lacks missing"
    elif [ $left -lt 10 ]; then
        note "$name: skipped, no time left"
    else
        seconds=$((seconds * slack))
        timeout -k 5 $((seconds < left ? seconds : left)) "$@" >>"${to:-/dev/stdout}"
        code=$?
        case $code in
        0) note "$name: $((SECONDS - began)) s" ;;
        124 | 137) note "$name: stopped at its limit after $((SECONDS - began)) s" ;;
        *) note "$name: failed with $code after $((SECONDS - began)) s" ;;
        esac
    fi
}

note() {
    echo "---- $*"
    summary+="$*"$'\n'
}

if [ "$device" = cpu ]; then
    tiny=(--set "backbone.options={img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=2}" --set heads.dino.prototypes=256
        --set views.global_1.size=32 --set views.global_2.size=32 --set views.local.size=16 --rounds 2)
    small=(--batch-size 4 "${tiny[@]}") large=(--batch-size 8 "${tiny[@]}") base=(--batch-size 4 "${tiny[@]}")
    kernels=(--way float32 "${small[@]:0:${#small[@]}-2}")
    packed=(--images 2 --rounds 2) count=48 side=64 data=(--images 16 --rounds 1)
    extract=(--images 16 --batch-size 8 --rounds 1 --rows 0) knn=(--device cpu --voters 2000 --queries 200 --rounds 1)
    parts=(--tiny --batch-size 4) theirs=original ways=(float32) slack=10 # CPUs may emulate bfloat16
else
    small=(--batch-size 64) large=(--batch-size 256) base=(--preset vitb16 --set views.locals=8 --batch-size 128)
    kernels=(--batch-size 256)
    packed=(--images 64) count=512 side=384 data=(--images 128 --rounds 3)
    extract=(--images 512 --batch-size 256 --workers 12 --rounds 3) knn=(--device cuda --threads "$(nproc)" --rounds 2)
    parts=(--batch-size 128) theirs=original-bf16 ways=(bfloat16 compiled) slack=1
fi
house="pydantic timm torchvision safetensors rich PIL numpy"

date -u
"$python" - <<'END'
import platform
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "torchvision", "timm", "pydantic", "safetensors", "faiss-cpu", "pillow", "rich", "typer", "numpy"):
    try:
        print(name, version(name), end="; ")
    except PackageNotFoundError:
        print("no", name, end="; ")
print("python", platform.python_version())
try:
    import torch
    print(torch.cuda.device_count(), "CUDA devices", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
except ImportError as error:
    print(error)
END
nvidia-smi 2>/dev/null | head -15
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
if [ "$device" = cuda ] && [ "$gpus" = 0 ]; then
    echo "error: torch sees no CUDA device"
    echo "hint: DINO_GPU_DEVICE=cpu tries the script with small networks"
    exit 1
fi

photos=${DINO_PHOTOS:-$scratch/drawn}
if [ ! -d "$photos" ]; then
    echo "no DINO_PHOTOS: drawing $count images of $side pixels; a photo of that size takes longer to decode"
    timeout 90 "$python" - "$photos" "$count" "$side" <<'END' || note "drawn images: failed"
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

from dinocli.apps.demo.drawings import CLASSES, draw

folder, count, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def write(index: int) -> None:
    drawing = draw(index, side)
    path = folder / ("val" if index % 4 == 3 else "train") / CLASSES[drawing.label] / f"{index:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawing.image).save(path, quality=92, subsampling=0)  # as --decode gpu takes them


with ProcessPoolExecutor() as pool:
    list(pool.map(write, range(count)))
END
fi
train=$photos
[ -d "$photos/train" ] && train=$photos/train

# All that a user does, on the device: a run that stops and resumes, features of both splits in one process beside those
# of the CPU, a score, and the two kinds of run that differ most. Views without local crops are an empty array.
whole_way() {
    set -e
    dino=("$python" -m dinocli)
    run=(--device "$device" --batch-size 16 --no-compile --workers 2)
    "${dino[@]}" doctor || true
    "${dino[@]}" pretrain "$train" --preset tiny "${run[@]}" --steps 12 --monitor "$photos" --out "$scratch/run"
    "${dino[@]}" pretrain "$train" --preset tiny "${run[@]}" --steps 20 --monitor "$photos" --out "$scratch/run"
    for where in "$device" cpu; do
        "${dino[@]}" extract "$scratch/run" "$photos" --device "$where" --batch-size 8 --precision float32 --out "$scratch/on-$where-$place"
        place=again # on a CPU both are the same
    done
    "$python" - "$scratch/on-$device-first" "$scratch/on-cpu-again" <<'END'
import sys
from pathlib import Path

import numpy as np

import dinocli

for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    one, other = (np.asarray(dinocli.read_features(Path(folder) / path.name).values) for folder in sys.argv[1:])
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    print(f"{path.stem}: {len(one)} images, smallest cosine between the devices' features {cosines.min():.6f}")
    if cosines.min() < 0.99:
        sys.exit(f"{path.stem}: the features differ, so the device has read other images")
END
    for where in "$device" cpu; do # compare the two scores
        "${dino[@]}" knn --features "$scratch/on-$device-first" --k 5 --device "$where"
    done
    if [ "$device" != cpu ]; then # compiled views, and JPEGs decoded on the device; the last note has the share of these
        decoded=(--device "$device" --batch-size 16 --compile --workers 2 --decode gpu)
        "${dino[@]}" pretrain "$train" --preset tiny "${decoded[@]}" --steps 10 --no-report --out "$scratch/decoded"
    fi
    "${dino[@]}" pretrain "$train" --preset tiny "${run[@]}" --steps 3 --set views.locals=0 --set views.local=none --no-report --out "$scratch/no-local"
    "${dino[@]}" pretrain "$train" --preset tiny-dinov2 "${run[@]}" --steps 5 --accumulate 2 --recompute --no-report --out "$scratch/v2"
}
export -f whole_way
export python device photos train scratch place=first

part whole-way 150 "$house typer faiss matplotlib" bash -c whole_way
[ "$device" = cpu ] && note "tests: skipped, they need a GPU" ||
    part tests 90 "$house pytest typer matplotlib" "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests
to=$out/parts.jsonl part parts 200 "$house" "$python" benchmarks/device_parts.py --device "$device" "${parts[@]}" --photos "$photos"
to=$out/steps.jsonl part step-small 140 "$house" "$python" benchmarks/step.py --json --device "$device" "${small[@]}" --ways "$theirs" "${ways[@]}"
to=$out/steps.jsonl part step-large 110 "$house" "$python" benchmarks/step.py --json --device "$device" "${large[@]}" --ways "$theirs" "${ways[@]}"
to=$out/steps.jsonl part step-photos 110 "$house" "$python" benchmarks/step.py --json --device "$device" "${large[@]}" --ways "${ways[@]}" --images "$train"
to=$out/steps.jsonl part step-base 120 "$house" "$python" benchmarks/step.py --json --device "$device" "${base[@]}" --ways "$theirs" "${ways[@]}"
part kernels 60 "$house" "$python" benchmarks/kernels.py --device "$device" "${kernels[@]}" --trace "$out/trace.json.gz"
part extract 60 "$house" "$python" benchmarks/extract.py "$train" --device "$device" "${extract[@]}"
part data 60 "$house" "$python" benchmarks/data.py "$train" "${data[@]}"
part packed 60 "rich" "$python" benchmarks/packed.py --device "$device" "${packed[@]}"
part knn 60 "$house faiss" "$python" benchmarks/knn.py "${knn[@]}"
part probe 60 "$house faiss" "$python" benchmarks/probe.py "$train"
if [ "$gpus" -ge 2 ]; then
    for kind in ddp fsdp; do
        part "two-gpus-$kind" 60 "$house typer faiss matplotlib" "$python" -m dinocli pretrain "$train" --gpus 2 --parallel $kind \
            --preset tiny --steps 50 --no-report --out "$scratch/$kind"
    done
else
    note "two-gpus: skipped, $gpus devices"
fi

tar czf "$out/compiled.tgz" -C "$scratch/compiled" .
printf '\n==== %s s in total\n%s' "$SECONDS" "$summary"
ls -l "$out"
exec >&3 2>&3
wait "$tee"
