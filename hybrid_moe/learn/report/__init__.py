"""The report: one HTML page of a policy and the records that it is judged by.

`data` has the figures, which are pure values; `draw` turns them into pictures and `page` into the page. The latter two
need the extra ``report``, so nothing is imported here.
"""
