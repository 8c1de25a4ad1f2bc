"""Models of other libraries and of one's own, each behind `teacher.model.Model`."""
