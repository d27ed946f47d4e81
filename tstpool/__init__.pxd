# cython: language_level=3
# What `from tstpool cimport ...` offers. Its contract stands in _core.pxd.
from tstpool._core cimport TST_DISCONNECT, TST_RECONNECTED, TST_RUN, TST_SEND, TST_SUSPEND, TstStat
from tstpool._core cimport TstData, TstHandler, TstNogilHandler, TstPool, TstSocket
from tstpool._core cimport tst_close, tst_need_send, tst_pause, tst_resume, tst_send, tst_send_eof, tst_send_message
