#!/usr/bin/env bash
# All that is to be measured on a GPU, in under ten minutes, with no network.
#
#   benchmarks/gpu.sh pack [DIR]    where there is a network: fetch the wheels that a bare machine with torch lacks
#   benchmarks/gpu.sh               measure everything
#   benchmarks/gpu.sh PART...       measure these parts: see the end of this file for their names
#
# Each part has a time of its own and fails alone; a part whose packages are not there is passed over, and said to be.
# Where wheels lie in .whl (or in $DINO_WHEELS) they are unpacked for this run and come before what is installed.
#
#   OUT               folder for gpu.txt (all output), steps.jsonl (figures), trace.json.gz     [gpu-results]
#   DINO_PHOTOS       folder of photos in class folders; pictures are drawn where it is not set
#   DINO_GPU_DEVICE   cpu tries this script with small networks                                  [cuda]
#   DINO_SECONDS      all that the run may take                                                  [560]
#
# On the machine that is lent to a session of this project: `benchmarks/gpu.sh pack`, name .whl in `carry`, and run
# `bash benchmarks/gpu.sh`. That machine has torch 2.11, torchvision, timm, safetensors, rich, typer, matplotlib, numpy
# and pytest; pydantic and faiss are what it lacks. timm and pillow are carried too, for a known version.
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
    echo "name $to in carry; 'echo /$to/ >> .git/info/exclude' keeps it out of git"
    exit
fi

device=${DINO_GPU_DEVICE:-cuda}
out=${OUT:-gpu-results}
mkdir -p "$out" || exit 1
scratch=$(mktemp -d)
exec 3>&1 > >(tee "$out/gpu.txt") 2>&1
tee=$!
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
rm -f "$out/steps.jsonl"
end=$((SECONDS + ${DINO_SECONDS:-560}))
wanted=" $* "
summary=""

if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "$wheels"/*.whl &&
        export PYTHONPATH=$scratch/site:$PYTHONPATH || echo "the wheels in $wheels do not fit this Python: see above"
fi

# The packages of those named that are not here.
lacking() {
    "$python" -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' "$@"
}

# part NAME SECONDS "PACKAGES" COMMAND...: its output on the way, what it gives on stdout to $to if that is set.
part() {
    local name=$1 seconds=$2 needs=$3 left=$((end - SECONDS)) missing began=$SECONDS code script
    shift 3
    case $wanted in "  " | *" $name "*) ;; *) return ;; esac
    printf '\n==== %s: %s\n' "$name" "$*"
    # shellcheck disable=SC2086
    missing=$(lacking torch $needs)
    for script in "$@"; do
        case $script in benchmarks/*.py) [ -f "$script" ] || missing="$script $missing" ;; esac
    done
    if [ -n "${missing// /}" ]; then
        tell "$name: passed over, for it lacks $missing"
    elif [ $left -lt 10 ]; then
        tell "$name: passed over, for the time is up"
    else
        timeout -k 5 $((seconds < left ? seconds : left)) "$@" >>"${to:-/dev/stdout}"
        code=$?
        case $code in
        0) tell "$name: $((SECONDS - began)) s" ;;
        124 | 137) tell "$name: stopped after $((SECONDS - began)) s" ;;
        *) tell "$name: failed with $code after $((SECONDS - began)) s" ;;
        esac
    fi
}

tell() {
    echo "---- $*"
    summary+="$*"$'\n'
}

if [ "$device" = cpu ]; then
    tiny=(--set "backbone.options={img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=2}" --set heads.dino.prototypes=256
        --set views.global_1.size=32 --set views.global_2.size=32 --set views.local.size=16 --rounds 2)
    small=(--batch-size 4 "${tiny[@]}") large=(--batch-size 8 "${tiny[@]}") base=(--batch-size 4 "${tiny[@]}")
    kernels=("${small[@]:0:${#small[@]}-2}")
    packed=(--images 2 --rounds 2) count=16 side=64 data=(--images 16 --rounds 1)
    extract=(--images 16 --batch-size 8 --rounds 1 --rows 0) knn=(--voters 2000 --queries 200 --rounds 1)
else
    small=(--batch-size 64) large=(--batch-size 256) base=(--preset vitb16 --set views.locals=8 --batch-size 128)
    kernels=(--batch-size 256)
    packed=(--images 64) count=512 side=384 data=(--images 128 --rounds 3)
    extract=(--images 512 --batch-size 256 --workers 12 --rounds 3) knn=(--threads "$(nproc)" --rounds 2)
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
    echo "no DINO_PHOTOS: $count pictures of $side pixels are drawn; a photo of that size takes longer to decode"
    timeout 90 "$python" - "$photos" "$count" "$side" <<'END' || tell "drawn pictures: none"
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

from dinocli.apps.demo.drawings import CLASSES, draw

folder, count, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def write(index: int) -> None:
    drawing = draw(index, side)
    path = folder / CLASSES[drawing.label] / f"{index:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawing.image).save(path, quality=92)


with ProcessPoolExecutor() as pool:
    list(pool.map(write, range(count)))
END
fi

ours=(bfloat16 compiled)
to=$out/steps.jsonl part step-small 140 "$house" "$python" benchmarks/step.py --json --device "$device" "${small[@]}"
to=$out/steps.jsonl part step-large 110 "$house" "$python" benchmarks/step.py --json --device "$device" "${large[@]}" --ways original-bf16 "${ours[@]}"
to=$out/steps.jsonl part step-base 120 "$house" "$python" benchmarks/step.py --json --device "$device" "${base[@]}" --ways original-bf16 "${ours[@]}"
to=$out/steps.jsonl part step-photos 110 "$house" "$python" benchmarks/step.py --json --device "$device" "${large[@]}" --ways "${ours[@]}" --images "$photos"
part kernels 60 "$house" "$python" benchmarks/kernels.py --device "$device" "${kernels[@]}" --trace "$out/trace.json.gz"
part packed 60 "rich" "$python" benchmarks/packed.py --device "$device" "${packed[@]}"
[ "$device" = cpu ] && tell "tests: passed over, for they need a GPU" ||
    part tests 90 "$house pytest typer matplotlib" "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors tests
part data 60 "$house" "$python" benchmarks/data.py "$photos" "${data[@]}"
part extract 60 "$house" "$python" benchmarks/extract.py "$photos" --device "$device" "${extract[@]}"
part knn 60 "$house faiss" "$python" benchmarks/knn.py "${knn[@]}"
part probe 60 "$house faiss" "$python" benchmarks/probe.py "$photos"
if [ "$gpus" -ge 2 ]; then
    for kind in ddp fsdp; do
        part "two-gpus-$kind" 60 "$house typer faiss matplotlib" "$python" -m dinocli pretrain "$photos" --gpus 2 --parallel $kind \
            --preset tiny --steps 50 --no-report --out "$scratch/$kind"
    done
else
    tell "two-gpus: passed over, for there are $gpus"
fi

printf '\n==== in all, after %s s\n%s' "$SECONDS" "$summary"
ls -l "$out"
exec >&3 2>&3
wait "$tee"
