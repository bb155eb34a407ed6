"""What the site has beyond the pages in docs/: notebooks, API pages and mathematics.

Nothing here is fetched when a page is viewed: formulas become MathML when the site is built, and
the font for them comes along.
"""

import ast
import html
import importlib.metadata
import io
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import math_core
import nbformat
from fontTools import subset, ttLib
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / 'rmsprop_jax'
# Files elsewhere in the repository that are pages too, so that links to them lead somewhere.
ELSEWHERE = {
    'CHANGELOG.md': 'changelog.md',
    'benchmarks/README.md': 'benchmarks.md',
    'fused_cpu/README.md': 'fused_cpu.md',
}
LINK = re.compile(r'\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)')
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# A cell that begins with a number and holds no long words: 26.5 ms, 0.94 [0.89, 1.05], 1 ± 0.1 %.
NUMBER = re.compile(r'[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?![.\w])(?!.*[A-Za-z]{4}).{,20}')


def on_config(config: Any) -> Any:
    """Fills the folders of the navigation, and adds pages that nobody has placed."""
    folders = {
        # Under short names: long ones would be cut off where they differ.
        'api/': [
            {name.removeprefix(f'{PACKAGE.name}.'): f'api/{name}.md'}
            for name in sorted(public_modules())
        ],
        'notebooks/': [f'notebooks/{path.stem}.md' for path in notebooks()],
    }
    sections = {title: entries for entry in config.nav for title, entries in entry.items()}
    for entry in config.nav:
        for title, entries in entry.items():
            entry[title] = folders.get(entries, entries) if isinstance(entries, str) else entries
    placed = {*ELSEWHERE.values(), *leaves(config.nav)}
    pages = sorted(path.name for path in (ROOT / 'docs').glob('*.md'))
    sections['In depth'] += [name for name in pages if name not in placed]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds what is generated."""
    for source, page in ELSEWHERE.items():
        text = with_links_of(source, page, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    for name, text in public_modules().items():
        files.append(File.generated(config, f'api/{name}.md', content=text))
    for path in notebooks():
        for page, content in notebook_files(path):
            files.append(File.generated(config, page, content=content))
    for name, content in assets():
        files.append(File.generated(config, f'assets/{name}', content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Follows links that leave the folder of pages."""
    path = page.file.src_uri
    if path in {*ELSEWHERE.values()} or '/' in path:
        return markdown
    return with_links_of(f'docs/{path}', path, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers render by themselves, and marks cells."""
    maths = math_core.LatexToMathML(fancy_error=False)

    def rendered(match: re.Match[str]) -> str:
        block = match[1] == 'div'
        formula = maths.convert_with_local_state(html.unescape(match[2]), displaystyle=block)
        # As high as a digit, or the sign of a root over a low letter hangs below the line.
        formula = formula.replace('</msqrt>', '<mspace height=".7em"/></msqrt>')
        return f'<div class="formula">{formula}</div>' if block else formula

    def marked(match: re.Match[str]) -> str:
        words = re.sub('<[^>]*>', '', match[1])
        codes = re.findall('<code>([^<]*)', match[1])
        kind = (
            'long'
            if len(words) > 60
            else 'code'
            if len(max(codes, key=len, default='')) > 30
            else 'number'
            if NUMBER.fullmatch(words)
            else 'medium'
            if len(words) > 40
            else ''
        )
        return f'<td class="{kind}">{match[1]}</td>' if kind else match[0]

    return re.sub('<td>(.*?)</td>', marked, MATHS.sub(rendered, content), flags=re.DOTALL)


def leaves(nav: Any) -> Iterator[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(entry)


def with_links_of(source: str, page: str, markdown: str) -> str:
    """The text of a file of the repository, with its links as they are on a page of the site."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        place = posixpath.relpath(place_of(target, source), posixpath.dirname(page) or '.')
        return f']({place}{match[2] or ""})'

    parts = re.split(r'(^```.*?^```$|`[^`\n]+`)', markdown, flags=re.DOTALL | re.MULTILINE)
    return ''.join(part if n % 2 else LINK.sub(moved, part) for n, part in enumerate(parts))


def place_of(target: str, source: str) -> str:
    """Where on the site a file of the repository is."""
    if target == 'README.md':
        return 'index.md'
    if target in ELSEWHERE:
        return ELSEWHERE[target]
    folder, _, rest = target.partition('/')
    if folder == 'docs' and rest:
        return rest
    if folder == 'notebooks' and rest:
        return target.removesuffix('.ipynb') + '.md'
    raise PluginError(f'{source} links to {target}, which is not on the site.')


def notebooks() -> list[pathlib.Path]:
    """The notebooks, with their outputs."""
    return sorted((ROOT / 'notebooks').glob('*.ipynb'))


def notebook_files(path: pathlib.Path) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook, and its figures."""
    page = f'notebooks/{path.stem}.md'
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == 'markdown':
            cell.source = with_links_of(f'notebooks/{path.name}', page, cell.source)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources['outputs'].items():
        text = text.replace(f'![png]({name})', f'![Figure]({path.stem}/{name})')
        yield f'notebooks/{path.stem}/{name}', content
    yield page, text


def public_modules() -> dict[str, str]:
    """The page of each module whose name has no underscore, by its dotted name."""
    found = {}
    for path in [*PACKAGE.glob('*.py'), *PACKAGE.glob('*/*.py')]:
        parts = path.relative_to(ROOT).with_suffix('').parts
        name = '.'.join(part for part in parts if part != '__init__')
        if '._' not in name and name != 'rmsprop_jax.demo':
            found[name] = f'# {name}\n\n{reference(name, ast.parse(path.read_text()))}'
    return found


def reference(name: str, module: ast.Module) -> str:
    """What mkdocstrings is to show of a module: what it defines and what it hands on."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    members = [node.name for node in module.body if isinstance(node, definitions)]
    members += [
        alias.name
        for node in module.body
        if isinstance(node, ast.ImportFrom) and node.module != PACKAGE.name
        for alias in node.names
        if alias.name == alias.asname and not is_module(f'{node.module}.{alias.name}')
    ]
    # What a package is named after comes first, and classes come last.
    members.sort(key=lambda member: (member not in name, member[0].isupper()))
    options = {
        'members': [member for member in members if not member.startswith('_')],
        'show_root_heading': False,
        'show_root_toc_entry': False,
    }
    return f'::: {name}\n    options: {json.dumps(options)}\n'


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package."""
    path = ROOT.joinpath(*name.split('.'))
    return path.is_dir() or path.with_suffix('.py').exists()


def assets() -> Iterator[tuple[str, str | bytes]]:
    """The style sheet, a script, and a font that has what formulas need."""
    for name in ('site.css', 'iframe-worker.js'):
        yield name, pathlib.Path(__file__).with_name(name).read_text()
    # Located, not imported: the package, which draws formulas, is not needed otherwise.
    files = importlib.metadata.distribution('ziamath')
    font = ttLib.TTFont(files.locate_file('ziamath/fonts/STIXTwoMath-Regular.ttf'))
    blocks = ((0x20, 0x17F), (0x370, 0x3FF), (0x2000, 0x23FF), (0x27C0, 0x2AFF), (0x1D400, 0x1D7FF))
    subsetter = subset.Subsetter(subset.Options(layout_features=['*'], notdef_outline=True))
    subsetter.populate(unicodes=[code for first, last in blocks for code in range(first, last + 1)])
    subsetter.subset(font)
    font.flavor = 'woff2'
    packed = io.BytesIO()
    font.save(packed)
    yield 'stix-two-math.woff2', packed.getvalue()
