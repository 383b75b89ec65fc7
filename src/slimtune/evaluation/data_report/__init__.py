"""Validation of a data set before training: one report with everything in it that would spoil a run.

    rows → `BatchTokenizer` → `TokenizedRowBatchMeasurer`, one batch at a time → `RowFacts` → `CHECKS` → `DataReport`

It takes one pass. About 200 bytes of each row are kept, so a million rows take 200 MB. Start at `report_builder.py`.
"""
