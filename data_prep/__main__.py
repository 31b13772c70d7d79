"""python -m data_prep [overrides]: any Countdown source as parquet in verl's format, with a datasheet.

    data/tiny/
        train.parquet, test.parquet   problems as data_prep/prompts.py shows them; no numbers are in both
        ood_<name>.parquet            test sets out of distribution (configs/ood)
        rejected.jsonl                rows of the source that are no problems, with place and reason
        datasheet.md, .json, .png     what is in it
        manifest.json                 source, configuration, rows and SHA-256 of every file, versions

The folder appears, or is replaced, as a whole (data_prep/folder.py). With the same source and configuration as before
nothing is done.
"""

if __name__ == "__main__":  # worker processes load this file too, and need nothing of it
    from data_prep.command import main

    main()
