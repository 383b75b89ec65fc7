"""A survey of a file of rows: one report before any training, of everything in the data that would spoil it.

    rows → read, rendered, tokenized, masked → `Lens`, a batch at a time → `Survey`, the file → report

One pass, each row's text gone after it; of a row stay about 200 bytes, so that a million rows take 200 MB. A process
that looks at batches imports neither `survey` nor torch.
"""
