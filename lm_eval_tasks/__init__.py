"""Tasks for lm-evaluation-harness, found through `sublim_plugin.lm_eval_hook`. See README.md."""
