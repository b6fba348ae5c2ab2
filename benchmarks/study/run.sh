#!/bin/bash
# The whole study, from the repository's root: bash benchmarks/study/run.sh. Stopped, it goes on where it was.
set -e
export HF_HUB_OFFLINE=1
here=benchmarks/study out=runs/study
python $here/make_models.py "$(python recipes/demo/find_model.py)"
python -m benchmarks.study.make_rows ../shared/data
python -m benchmarks.study.make_conflicts $out/models/s1

inspect() { # model, data
    python -m eaft inspect $out/models/$1 $out/data/$2.jsonl --rollouts 32 --max_new_tokens 48 --output_dir $out/inspect/$2-$1
}
compare() { # recipe, model, data, and more flags
    python -m eaft compare --config $here/$1.yaml --jobs 2 --model_name_or_path $out/models/$2 --output_dir $out/$3-$2 "${@:4}"
}
injected() { # data
    echo --dataset_name $out/data/$1-{seed}.jsonl --held_out $out/data/$1_held_out.jsonl
}

# The first dose, how sure the base model is of itself; then the second, conflicts injected at s = 1
for s in 2 1 1.5 3 1.25; do
    inspect s$s gsm8k
    compare gsm8k s$s gsm8k --objectives sft eaft --learning_rates 3e-5
done
for s in 2 1 3; do
    inspect s$s function_calls
    compare function_calls s$s function_calls --objectives sft eaft --learning_rates 3e-5
done
for data in gsm8k-{format,fact}-{1,0.5}; do
    inspect s1 $data
    compare gsm8k s1 $data $(injected $data) --objectives sft eaft --learning_rates 3e-5
done
# At s = 2: does it turn with the learning rate? Why? And what else is there?
compare gsm8k s2 gsm8k --objectives sft eaft --learning_rates 1e-5 3e-5 1e-4 --seeds 0 1 2
compare gsm8k s2 gsm8k --learning_rates 3e-5
# Does what masks the conflicts alone save elsewhere what it saves at s = 2?
for s in 3 1; do
    compare gsm8k s$s gsm8k --objectives sft conflict-mask --learning_rates 3e-5
done
