"""python -m data_prep [overrides]: any Countdown source as parquet in verl's format, with a datasheet.

    data/tiny/
        train.parquet, test.parquet   problems as in data_prep/prompts.py; no numbers are in both, unless split= says so
        ood_<name>.parquet            test sets out of distribution (configs/ood)
        rejected.jsonl                rows of the source that are not valid problems, with place and reason
        datasheet.md, .json, .png     statistics of all files
        manifest.json                 source, configuration, rows and SHA-256 of every file, versions

    python -m data_prep                                                    problems of its own, for the tiny run
    python -m data_prep source=local source.paths=mine.csv prompt=mini_r1 out=data/mine

The folder appears, or is replaced, as a whole (data_prep/folder.py). If the source and the
configuration have not changed, nothing is done.
"""

if __name__ == "__main__":  # worker processes load this file too, but use nothing of it
    from data_prep.command import main

    main()
