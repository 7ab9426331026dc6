"""The exact loss of a batch that is spread over processes: what the losses' ``group`` argument does."""
