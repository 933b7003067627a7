#!/bin/sh
# The reproduction of docs/indexcache.md: models, searches beside the true optimum, distillation, tables and plots.
#
#   sh recipes/indexcache_nano.sh TEXT OUT [dense] [full] [search] [aware] [plain] [tables]
#
# TEXT is a UTF-8 file or a folder of .txt files. Without stages all of them run, one after the other; each takes at
# most 90 minutes on one core, keeps what is done and goes on where it stopped. SEEDS (default "0 1 2 3 4") names the
# models; two of these commands with seeds of their own use two cores. QUICK=1 is a version of ten minutes.
set -eu
text=$1 out=$2
shift 2
seeds=${SEEDS:-0 1 2 3 4} trained=${AWARE_SEEDS:-0 1 3} here=$(dirname "$0")
stages=${*:-dense full search aware plain tables}
tasks="recall 2hop 3hop 4hop" eighth=FSSSSSSSFSSS sequences=64 pretraining="" alone=200 together=400 least=2
if [ "${QUICK:-}" ]; then
    seeds=0 trained=0 tasks=recall sequences=16 pretraining="--steps 800 --hops 0" alone=60 together=40 least=3
fi
steps=$together
mkdir -p "$out"

run() { # OUT COMMAND...: trains into OUT, unless that is done, and writes down how long it took
    target=$1
    shift
    if [ ! -f "$target/config.json" ]; then
        resume=""
        [ -f "$target/training/training.json" ] && resume=--resume
        began=$(date +%s)
        "$@" $resume
        echo "$(basename "$target") $(($(date +%s) - began))" >>"$out/seconds.txt"
    fi
}

distil() { # SEED NAME PATTERN [OPTIONS]
    seed=$1 target=$out/$2-$1 pattern=$3
    shift 3
    run "$target" nanoglm indexcache distil "$out/dense-$seed" "$pattern" "$target" --text "$text" --tasks \
        --topk 32 --warmup $alone --steps "$steps" --seed $((seed + 100)) "$@"
}

gates() { # SEED: whether it matters what its all-Full model selects
    nanoglm indexcache gates "$out/full-$1" --tasks $tasks --sequences $sequences --seed 2
}

found() { # SEED COUNT: what greedy found
    python "$here/indexcache_tables.py" pattern "$out/search-$1-$2" greedy "$2"
}

for stage in $stages; do
    case $stage in
    dense)
        for seed in $seeds; do
            run "$out/dense-$seed" nanoglm train "$here/indexcache.py" --text "$text" --out "$out/dense-$seed" \
                --seed "$seed" $pretraining
        done
        ;;
    full)
        for seed in $seeds; do
            for steps in $together $((2 * together)) $((3 * together)); do # until its gates are open
                [ ! -d "$out/shut-$seed-$steps" ] || continue
                distil "$seed" full FFFFFFFFFFFF
                code=0
                gates "$seed" || code=$?
                case $code in
                0) continue 2 ;;
                1) ;; # shut
                *) exit $code ;;
                esac
                mv "$out/full-$seed" "$out/shut-$seed-$steps"
            done
            echo "seed $seed: its gates stay shut, see $out/shut-$seed-*" >&2
            exit 1
        done
        ;;
    search)
        for seed in $seeds; do
            for count in $least 3; do # a sixth, and of every eighth the same number; a quarter
                if [ $count -gt $least ] && [ ! -d "$out/search-$seed-$count" ]; then
                    cp -r "$out/search-$seed-$least" "$out/search-$seed-$count" # what was evaluated is known there too
                fi
                nanoglm indexcache search "$out/full-$seed" --keep $count --tasks $tasks --sequences $sequences \
                    --seed 1 --out "$out/search-$seed-$count" \
                    --patterns $eighth --method greedy exhaustive swap beam uniform similarity overlap random
            done
            nanoglm indexcache overlap "$out/full-$seed" --tasks $tasks --out "$out/search-$seed-3"
            # Reported on other sequences than those that were searched on.
            nanoglm indexcache search "$out/full-$seed" --tasks $tasks --sequences $sequences --seed 2 --keep 3 \
                --method uniform --out "$out/test-$seed" \
                --patterns $(python "$here/indexcache_tables.py" patterns "$out/search-$seed-3" "$out/search-$seed-$least")
        done
        ;;
    aware)
        for seed in $trained; do
            steps=$together
            distil "$seed" uniform4 FSSSFSSSFSSS
            distil "$seed" own4 FSSSFSSSFSSS --own-layer
            distil "$seed" greedy4 "$(found "$seed" 3)"
            distil "$seed" random4 FSSSSSFSSFSS # drawn
            [ "${QUICK:-}" ] || distil "$seed" uniform8 $eighth
            [ "${QUICK:-}" ] || distil "$seed" greedy8 "$(found "$seed" 2)"
            for arm in uniform4 own4 greedy4 random4 uniform8 greedy8; do
                [ ! -d "$out/$arm-$seed" ] || nanoglm indexcache search "$out/$arm-$seed" --tasks $tasks \
                    --sequences $sequences --seed 2 --keep 1 --method --out "$out/test-$arm-$seed"
            done
        done
        ;;
    plain)
        python "$here/indexcache_plain.py" --text "$text" --out "$out/plain" ${QUICK:+--steps 300}
        ;;
    tables) python "$here/indexcache_tables.py" tables "$out" ;;
    *)
        echo "stage is $stage; expected dense, full, search, aware, plain or tables" >&2
        exit 2
        ;;
    esac
done
