"""A folder of conversational rows, scored the plain way: whole logits, one row at a time."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eaft.inspection.folder import BASE, EXAMPLES, TOKENS, VOCABULARY
from eaft.inspection.summary import DATA, ROLLOUTS
from tests.inspection.made import TOP_K, columns


def score_rows(folder, model, tokenizer, rows, rollouts=()):
    """Write the folder; rows and rollouts have `prompt` and `completion`, both messages."""
    tokens, examples, occurring = [], [], set()
    for origin, of_origin in ((DATA, rows), (ROLLOUTS, rollouts)):
        for number, row in enumerate(of_origin):
            prompt = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            ids = encoded["input_ids"]
            labelled = [start >= len(prompt) for start, _ in encoded["offset_mapping"]]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].float()
            logits = torch.cat(
                [logits[:1], logits[:-1]]
            )  # a token's are those of the position before
            found, stats = columns(logits, ids, labelled)
            keep = torch.tensor(labelled)
            nll, conflict = stats.nll[keep], stats.is_conflict[keep]
            index = len(examples)
            keys = {
                "example": [index] * len(ids),
                "position": list(range(len(ids))),
                "token_id": ids,
            }
            ends = [end for _, end in encoded["offset_mapping"]]
            tokens.append(pa.table({**keys, "end": ends, "labelled": labelled, **found}, TOKENS))
            occurring |= {*ids, *(first for first in found["first_choice"] if first is not None)}
            examples.append(
                {
                    **{
                        "example": index,
                        "origin": origin,
                        "source": "rows",
                        "row": number,
                        "digest": f"{number:016x}",
                    },
                    **{
                        "text": text,
                        "messages": json.dumps(row),
                        "tokens": len(ids),
                        "labelled": int(keep.sum()),
                    },
                    **{
                        "cut": 0,
                        "cut_labelled": 0,
                        "nll": float(nll.mean()),
                        "entropy": float(stats.entropy[keep].mean()),
                    },
                    "conflict_share": float(conflict.float().mean()),
                    "conflict_nll_share": float((nll * conflict).sum() / nll.sum()),
                }
            )
    (folder / "tokens").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tokens), folder / "tokens" / "00000.parquet")
    pq.write_table(pa.Table.from_pylist(examples, EXAMPLES), folder / "examples.parquet")
    ids = sorted(occurring)
    vocabulary = {"token_id": ids, "text": [tokenizer.decode([i]) for i in ids]}
    vocabulary["special"] = [i in tokenizer.all_special_ids for i in ids]
    pq.write_table(pa.table(vocabulary, VOCABULARY), folder / "vocabulary.parquet")
    run = {
        "scored": True,
        "finished": True,
        "model": "SmolLM2",
        "dataset": "rows",
        "top_k": TOP_K,
        "config": {},
    }
    (folder / "run.json").write_text(
        json.dumps({**run, "models": [{"name": BASE, "model": "SmolLM2"}]})
    )
    return folder
