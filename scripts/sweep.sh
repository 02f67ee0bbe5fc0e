#!/bin/sh
# Run test_quant.py over models, seeds, modes and bit widths, and keep one row a run.
#
#   scripts/sweep.sh demo                          the README's demo table: no data set, no GPU
#   scripts/sweep.sh cifar                         photographs: CIFAR-10, and the models that are trained on it
#   scripts/sweep.sh precision                     the same, generated as a GPU does it: bfloat16 products, compiled
#   DATASET=/path/to/imagenet scripts/sweep.sh paper    the paper's table
#   MODELS=NAME DATASET=DIR OPTIONS="--checkpoint FILE" scripts/sweep.sh own    a model of your own
#
# Rows that are there are skipped, so an interrupted sweep goes on where it stopped; a run that fails is a row with
# its reason, the sweep goes on, and ends with exit code 1. Images are generated once a model, seed and OPTIONS, and used
# for all bit widths. Progress and errors of a run are in errors.txt of its folder.
# Change what is swept through these variables: MODELS, BITS, MODES, SEEDS, ROWS (the CSV file), RUNS (a folder for
# images and results), PYTHON, DATASET, OPTIONS (more options of test_quant.py).
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
    SEEDS=${SEEDS:-0 1 2}
    : "${DATASET:?expected DATASET=/path/to/imagenet}"
    ;;
own)
    : "${MODELS:?expected MODELS, names of test_quant.py}" "${DATASET:?expected DATASET=/path/to/images}"
    BITS=${BITS:-8/8 4/8 6/6 4/4}
    SEEDS=${SEEDS:-0 1 2}
    ;;
*)
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
MODES=${MODES:-0 1 2}
ROWS=${ROWS:-scripts/results/$1.csv}
RUNS=${RUNS:-runs/sweep}
PYTHON=${PYTHON:-python}
made=$(printf %s "${OPTIONS:-}" | cksum) # other options may make other images, and results
made=${OPTIONS:+_${made%% *}}
failed=0
trap 'exit 130' INT TERM

for model in $MODELS; do
    for seed in $SEEDS; do
        for mode in $MODES; do
            for bits in $BITS; do
                w_bit=${bits%/*} a_bit=${bits#*/}
                "$PYTHON" scripts/rows.py has "$ROWS" "$model" "$w_bit" "$a_bit" "$mode" "$seed"
                case $? in 0) continue ;; 1) ;; *) exit 2 ;; esac
                run="$RUNS/${model}_w${w_bit}a${a_bit}_mode${mode}_seed${seed}${made}"
                images="$RUNS/${model}_seed${seed}${made}.safetensors"
                mkdir -p "$run" || exit 2
                set -- --model "$model" --w_bit "$w_bit" --a_bit "$a_bit" --mode "$mode" --seed "$seed"
                [ -n "${DATASET:-}" ] && set -- "$@" --dataset "$DATASET"
                [ "$mode" = 0 ] && [ -f "$images" ] && set -- "$@" --images "$images"
                echo "== $*"
                # shellcheck disable=SC2086
                if "$PYTHON" test_quant.py "$@" ${OPTIONS:-} --output-dir "$run" 2>"$run/errors.txt"; then
                    "$PYTHON" scripts/rows.py add "$ROWS" "$run/results.json" || exit 2
                    if [ "$mode" = 0 ] && [ ! -f "$images" ]; then
                        cp "$run/images.safetensors" "$images.draft" && mv "$images.draft" "$images"
                    fi
                else
                    code=$?
                    [ "$code" -ge 130 ] && exit "$code"
                    reason=$(grep . "$run/errors.txt" | tail -n 1)
                    echo "failed: $reason"
                    "$PYTHON" scripts/rows.py fail "$ROWS" "$model" "$w_bit" "$a_bit" "$mode" "$seed" "$reason" || exit 2
                    failed=1
                fi
            done
        done
    done
done
exit "$failed"
