"""webdataset streams, one file per source (sample -> Sequence), and the jobs that write shards."""
