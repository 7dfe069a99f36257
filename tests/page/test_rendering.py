"""Messages on the page: Markdown, hostile text, growing text, copying."""

from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.page.steps import MakeSite, answers, expect_idle, open_page, said_by_user, say

pytestmark = pytest.mark.needs("chromium")


HOSTILE = """<img src=x onerror="alert(1)"> <script>alert(2)</script>

[one](javascript:alert(3)) [two](JaVaScRiPt:alert(4)) [three](data:text/html,<script>alert(5)</script>)
[four](vbscript:x) [five](//evil.example/) [six](https://good.example/"onclick="alert(6))

```html" onload="alert(7)
<svg onload=alert(8)>
```

- <iframe src="javascript:alert(9)"></iframe>
- `<b>bold</b>`"""


def test_hostile_messages_do_nothing(page: Page, make_site: MakeSite) -> None:
    site = make_site([HOSTILE])
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    open_page(page, site.url)
    page.get_by_label("Message", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Send").click()
    site.say()
    expect_idle(page)
    expect(said_by_user(page)).to_have_text([HOSTILE])
    expect(answers(page)).to_contain_text('<img src=x onerror="alert(1)"> <script>alert(2)</script>')
    expect(answers(page)).to_contain_text("[one](javascript:alert(3)) [two](JaVaScRiPt:alert(4))")
    expect(answers(page).locator("pre")).to_have_text("<svg onload=alert(8)>")
    expect(answers(page).locator("li").first).to_have_text('<iframe src="javascript:alert(9)"></iframe>')
    expect(page.locator("#thread :is(img, script, iframe, svg, b)")).to_have_count(0)
    addresses = answers(page).locator("a").evaluate_all("(links) => links.map((link) => link.href)")
    assert all(address.startswith("https://good.example/") for address in addresses)
    handlers = "(all) => all.filter((each) => [...each.attributes].some((one) => one.name.startsWith('on'))).length"
    assert page.locator("#thread *").evaluate_all(handlers) == 0
    page.reload()
    expect(answers(page).locator("pre")).to_have_text("<svg onload=alert(8)>")
    assert not dialogs
    assert all(url.startswith(site.url) for url in requested)


def test_content_security_policy_forbids_what_the_page_does_not_need(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    policy = httpx.get(site.url).headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    violations: list[str] = []
    page.on(
        "console",
        lambda message: violations.append(message.text) if "Content Security Policy" in message.text else None,
    )
    open_page(page, site.url)
    assert not violations
    page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
          const script = document.createElement("script");
          script.textContent = "window.hacked = 2";
          document.body.append(script);
        }"""
    )
    page.wait_for_function("() => document.querySelector('img').complete")
    assert page.evaluate("() => window.hacked") is None
    assert violations


RENDERED = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "**bold** and *it* and ***both*** and _it_": (
        "<p><strong>bold</strong> and <em>it</em> and <strong><em>both</em></strong> and <em>it</em></p>"
    ),
    "**bold with *it* inside** a*b snake_case_name 2 * 3 * 4": (
        "<p><strong>bold with <em>it</em> inside</strong> a*b snake_case_name 2 * 3 * 4</p>"
    ),
    "open **bold": "<p>open **bold</p>",
    "`a <b> *c*` and ``x ` y``": "<p><code>a &lt;b&gt; *c*</code> and <code>x ` y</code></p>",
    r"\*not\* \`code\`": "<p>*not* `code`</p>",
    "# One\n### Two\ntext": "<h3>One</h3><h5>Two</h5><p>text</p>",
    "> quoted\n> **more**\n\nafter": "<blockquote><p>quoted\n<strong>more</strong></p></blockquote><p>after</p>",
    "- a\n- b\n  - c\n  - d\n- e": "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
    "text\n1. a\n2. b\n\nafter": "<p>text</p><ol><li>a</li><li>b</li></ol><p>after</p>",
    "3) c\n4) d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n\n   more\n\n2. b": "<ol><li>a<p>more</p></li><li>b</li></ol>",
    "- a\n\t- b\n\t\t- c\n- d": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>",
    "## Two ##\n# C#\n### #": "<h4>Two</h4><h3>C#</h3><h5></h5>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "(https://a.example/x_(y)), http://b.example/(z": (
        '<p>(<a href="https://a.example/x_(y)" rel="noopener noreferrer" target="_blank">https://a.example/x_(y)</a>), '
        '<a href="http://b.example/(z" rel="noopener noreferrer" target="_blank">http://b.example/(z</a></p>'
    ),
    "[site](https://a.example/x_(y)?q=1) <http://b.example/>.": (
        '<p><a href="https://a.example/x_(y)?q=1" rel="noopener noreferrer" target="_blank">site</a> '
        '&lt;<a href="http://b.example/" rel="noopener noreferrer" target="_blank">http://b.example/</a>&gt;.</p>'
    ),
    "[me](mailto:a@b.example) [no](/relative) [no](ftp://a.example)": (
        '<p><a href="mailto:a@b.example" rel="noopener noreferrer" target="_blank">me</a> '
        "[no](/relative) [no](ftp://a.example)</p>"
    ),
}


def test_markdown(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    open_page(page, site.url)
    render = """async (texts) => {
      const { render } = await import("./web/markdown.js");
      return texts.map((text) => {
        const element = document.createElement("div");
        render(element, text);
        return element.innerHTML;
      });
    }"""
    assert dict(zip(RENDERED, page.evaluate(render, list(RENDERED)), strict=True)) == RENDERED
    code = page.evaluate(render, ["```js\nlet a = `1`;\n\n  # b\n```\nafter", "~~~\nopen\n```"])
    assert "<pre" in code[0] and "<code>let a = `1`;\n\n  # b</code>" in code[0] and code[0].endswith("<p>after</p>")
    assert "<span>js</span>" in code[0] and "<code>open\n```</code>" in code[1]
    [table] = page.evaluate(render, ["| a | b |\n|---|:-:|\n| 1 | **2** |"])
    assert "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td><strong>2</strong></td></tr>" in table


def test_growing_markdown_ends_like_markdown_rendered_at_once(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    open_page(page, site.url)
    text = "\n\n".join([*RENDERED, "```py\nprint('*')\n```", "| a | b |\n|---|---|\n| 1 | 2 |", "**the** `end`"])
    grown = page.evaluate(
        """async (text) => {
          const { render } = await import("./web/markdown.js");
          const whole = document.createElement("div");
          render(whole, text);
          const growing = document.createElement("div");
          let first;
          for (let end = 1; end <= text.length; end += 1) {
            render(growing, text.slice(0, end), true);
            first ??= end > 40 ? growing.firstChild : undefined;
          }
          const open = growing.innerHTML;
          render(growing, text);
          return { whole: whole.innerHTML, grown: growing.innerHTML, kept: growing.firstChild === first, open };
        }""",
        text,
    )
    assert grown["grown"] == grown["whole"]
    assert grown["kept"], "a block that had not changed was made anew"
    growing = """async (texts) => {
      const { render } = await import("./web/markdown.js");
      return texts.map((text) => {
        const element = document.createElement("div");
        render(element, text, true);
        return element.innerHTML;
      });
    }"""
    # An open mark looks as it will once it is closed.
    assert page.evaluate(growing, ["so **bol", "so `co", "so **", "so *it* **b *c"]) == [
        "<p>so <strong>bol</strong></p>",
        "<p>so <code>co</code></p>",
        "<p>so </p>",
        "<p>so <em>it</em> <strong>b <em>c</em></strong></p>",
    ]


def test_growing_text_keeps_elements_focus_and_selection(page: Page, make_site: MakeSite) -> None:
    """Only the last line is rendered again, so that the cost of a token does not grow with a list or table."""
    open_page(page, make_site().url)
    count, button, selection, text = page.evaluate(
        """async () => {
          const { render } = await import("./web/markdown.js");
          const element = document.createElement("div");
          document.body.append(element);
          const grow = (text, from = 1) => {
            for (let end = from; end <= text.length; end += 1) {
              render(element, text.slice(0, end), true);
            }
          };
          const lines = (line) => Array.from({ length: 50 }, (_, number) => line(number)).join("\\n");
          let added = 0;
          new MutationObserver((records) => {
            for (const record of records) {
              added += record.addedNodes.length;
            }
          }).observe(element, { subtree: true, childList: true });
          const table = "|a|b|\\n|-|-|\\n" + lines((number) => `| ${number} | x |`);
          for (const text of [lines((number) => `- item ${number}`), table]) {
            render(element, "");
            grow(text);
            await null;
          }
          const count = added;

          const code = "1. Do:\\n\\n   ```sh\\n   ls";
          render(element, "");
          grow(code);
          const button = element.querySelector("li button");
          button.focus();
          button.textContent = "Copied";
          grow(`${code} -l\\n   ps`, code.length);
          const sameButton = document.activeElement === button && button.isConnected && button.textContent;

          const paragraph = "Some **bold** words";
          render(element, "");
          grow(paragraph);
          getSelection().selectAllChildren(element.querySelector("strong"));
          getSelection().extend(element.querySelector("p").lastChild, 3);
          grow(`${paragraph} and *more`, paragraph.length);
          return [count, sameButton, getSelection().toString(), element.textContent];
        }"""
    )
    assert count < 600, "rows or items were made anew"
    assert (button, selection, text) == ("Copied", "bold wo", "Some bold words and more")


def test_growing_table_is_a_table_all_the_time(page: Page, make_site: MakeSite) -> None:
    open_page(page, make_site().url)
    shown = page.evaluate(
        """async (text) => {
          const { render } = await import("./web/markdown.js");
          const element = document.createElement("div");
          const shown = new Set();
          for (let end = text.indexOf("1"); end <= text.length; end += 1) {
            render(element, text.slice(0, end), true);
            shown.add(Array.from(element.children, (each) => each.className || each.tagName).join());
          }
          return [...shown, element.textContent];
        }""",
        "|a|b|\n|-|-|\n| 1 | one |\n| 2 | two",
    )
    assert shown == ["table", "ab1one2two"]


def test_copy_buttons(new_context: Callable[..., BrowserContext], make_site: MakeSite) -> None:
    answer = "Look:\n\n```js\nlet a = 1;\n\n```\n\n**Done**"
    site = make_site([answer], [answer], allowed_hosts=("chat.test", "127.0.0.1"))
    site.say(2)
    context = new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.app.url)
    page = open_page(context.new_page(), site.url)
    say(page, "Code, please")
    clipboard = "() => navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy answer").click()
    expect(page.get_by_role("button", name="Copy answer")).to_have_text("Copied")
    assert page.evaluate(clipboard) == answer
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copy code")).to_have_text("Copied")
    assert page.evaluate(clipboard) == "let a = 1;\n"
    page.get_by_role("button", name="Copy message").click()
    expect(page.get_by_role("button", name="Copy message")).to_have_text("Copied")
    assert page.evaluate(clipboard) == "Code, please"

    # Plain HTTP in a local network is not a secure context: no navigator.clipboard, no crypto.randomUUID.
    plain = open_page(context.new_page(), site.url.replace("127.0.0.1", "chat.test"))
    assert plain.evaluate("() => isSecureContext") is False
    say(plain, "Again")
    plain.get_by_role("button", name="Copy message").click()
    expect(plain.get_by_role("button", name="Copy message")).to_have_text("Copied")
    expect(plain.locator(":focus")).to_have_accessible_name("Copy message")
    page.bring_to_front()
    assert page.evaluate(clipboard) == "Again"
