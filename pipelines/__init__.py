"""Jobs on a Ray cluster: pack, train, evaluate, publish. Each reads a YAML job and hands over a folder."""
