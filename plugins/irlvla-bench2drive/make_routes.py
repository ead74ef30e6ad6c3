"""Write irlvla_bench2drive/routes.json, facts of a checkout of Bench2Drive: python make_routes.py CHECKOUT

The routes of leaderboard/data/bench2drive220.xml, with town and scenario, and which scenarios need which ability
(tools/ability_benchmark.py).
"""

import ast
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SOURCE = "https://github.com/Thinklab-SJTU/Bench2Drive"
TARGET = Path(__file__).parent / "irlvla_bench2drive" / "routes.json"


def main(checkout: str) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", checkout, *arguments], check=True, capture_output=True, text=True).stdout

    script = ast.parse(git("show", "HEAD:tools/ability_benchmark.py"))
    assigned = [node for node in script.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "Ability"]
    abilities = {name: sorted(set(scenarios)) for name, scenarios in ast.literal_eval(assigned[0].value).items()}
    routes = [
        (route.attrib["id"], route.attrib["town"], route.findall("scenarios/scenario")[0].attrib["type"])
        for route in ElementTree.fromstring(git("show", "HEAD:leaderboard/data/bench2drive220.xml")).findall("route")
    ]
    lines = [json.dumps(route) for route in sorted(routes, key=lambda route: int(route[0]))]
    head = {"source": SOURCE, "commit": git("rev-parse", "HEAD").strip(), "abilities": abilities}
    TARGET.write_text(json.dumps(head, indent=1)[:-2] + ',\n "routes": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
