#!/bin/sh
# Run test_quant.py over models, seeds, recipes, modes and bit widths, and keep one row a run.
#
#   scripts/sweep.sh demo                          the README's demo table: no data set, no GPU
#   scripts/sweep.sh cifar                         photographs: CIFAR-10, and the models that are trained on it
#   scripts/sweep.sh precision                     the same, generated with bfloat16 products, compiled
#   DATASET=/path/to/imagenet scripts/sweep.sh paper    the paper's table, and the same with --recipe best
#   MODELS=NAME DATASET=DIR OPTIONS="--checkpoint FILE" scripts/sweep.sh own    a model of your own
#
# Rows that are there, of the same DATASET and OPTIONS, are skipped, so an interrupted sweep goes on where it stopped; a
# run that fails is a row with its reason, the sweep goes on, and ends with exit code 1. Images are generated once a
# model, seed and OPTIONS, and used for all bit widths and recipes. Progress and errors of a run are in errors.txt of its
# folder.
# Change what is swept through these variables: MODELS, BITS, RECIPES, MODES, SEEDS, ROWS (the CSV file), RUNS (a folder
# for images and results), PYTHON, DATASET, OPTIONS (more options of test_quant.py).
set -u
cd "$(dirname "$0")/.." || exit 1

case "${1:-}" in
demo)
    MODELS=${MODELS:-demo_vit demo_swin}
    BITS=${BITS:-8/8 4/8 6/6 4/4}
    SEEDS=${SEEDS:-0 1 2}
    ;;
cifar)
    MODELS=${MODELS:-cifar_vit cifar_swin}
    BITS=${BITS:-8/8 4/8 6/6 4/4}
    SEEDS=${SEEDS:-0 1 2}
    OPTIONS="--limit 2000 ${OPTIONS:-}" # as many as of the fractals
    ;;
precision)
    MODELS=${MODELS:-demo_vit demo_swin}
    BITS=${BITS:-8/8 4/8}
    MODES=${MODES:-0}
    SEEDS=${SEEDS:-0 1 2}
    OPTIONS="--precision bf16 --compile ${OPTIONS:-}"
    ;;
paper)
    MODELS=${MODELS:-deit_tiny deit_small deit_base swin_tiny swin_small}
    BITS=${BITS:-4/8 8/8}
    RECIPES=${RECIPES:-paper best}
    SEEDS=${SEEDS:-0 1 2}
    : "${DATASET:?expected DATASET=/path/to/imagenet}"
    ;;
own)
    : "${MODELS:?expected MODELS, names of test_quant.py}" "${DATASET:?expected DATASET=/path/to/images}"
    BITS=${BITS:-8/8 4/8 6/6 4/4}
    SEEDS=${SEEDS:-0 1 2}
    ;;
*)
    sed -n '2,17s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
RECIPES=${RECIPES:-paper}
MODES=${MODES:-0 1 2}
ROWS=${ROWS:-scripts/results/$1.csv}
RUNS=${RUNS:-runs/sweep}
PYTHON=${PYTHON:-python}
made=$(printf %s "${OPTIONS:-}" | cksum) # other options may make other images, and results
made=${OPTIONS:+_${made%% *}}
# shellcheck disable=SC2086
others=$(echo ${DATASET:+--dataset "$DATASET"} ${OPTIONS:-}) # as rows tell them
failed=0
trap 'exit 130' INT TERM

# One run: MODEL W_BIT A_BIT RECIPE MODE SEED
run() {
    "$PYTHON" scripts/rows.py has "$ROWS" "$@" "$others"
    case $? in 0) return ;; 1) ;; *) exit 2 ;; esac
    key="$*"
    folder="$RUNS/$1_w$2a$3_$4_mode$5_seed$6$made"
    images="$RUNS/$1_seed$6$made.safetensors"
    [ "$4" = learned ] && images="$RUNS/$1_seed$6_learned$made.safetensors" # which takes more of them
    mkdir -p "$folder" || exit 2
    mode=$5
    set -- --model "$1" --w_bit "$2" --a_bit "$3" --recipe "$4" --mode "$5" --seed "$6"
    [ -n "${DATASET:-}" ] && set -- "$@" --dataset "$DATASET"
    [ "$mode" = 0 ] && [ -f "$images" ] && set -- "$@" --images "$images"
    echo "== $*"
    # shellcheck disable=SC2086
    if "$PYTHON" test_quant.py "$@" ${OPTIONS:-} --output-dir "$folder" 2>"$folder/errors.txt"; then
        "$PYTHON" scripts/rows.py add "$ROWS" "$folder/results.json" "$others" || exit 2
        if [ "$mode" = 0 ] && [ ! -f "$images" ]; then
            cp "$folder/images.safetensors" "$images.draft" && mv "$images.draft" "$images"
        fi
    else
        code=$?
        [ "$code" -ge 130 ] && exit "$code"
        reason=$(grep . "$folder/errors.txt" | tail -n 1)
        echo "failed: $reason"
        # shellcheck disable=SC2086
        "$PYTHON" scripts/rows.py fail "$ROWS" $key "$others" "$reason" || exit 2
        failed=1
    fi
}

for model in $MODELS; do
    for seed in $SEEDS; do
        for recipe in $RECIPES; do
            for mode in $MODES; do
                for bits in $BITS; do
                    run "$model" "${bits%/*}" "${bits#*/}" "$recipe" "$mode" "$seed"
                done
            done
        done
    done
done
exit "$failed"
