from irlvla.testing import planner_checks

test_gaussian = planner_checks("acme_gaussian")
