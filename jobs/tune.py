"""A sweep as a Ray job: the same arguments as `raygrec tune`.

    ray job submit --entrypoint-resources '{"train_driver": 1}' --working-dir . -- \
        python jobs/tune.py tune_spaces/galrec.yaml store=/mnt/stores/beauty out=/mnt/sweeps/galrec --final-seeds 3

Submitted again with --resume, it goes on where it ended, whatever ended it.
"""

import sys

from raygrec.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune"]
    main()
