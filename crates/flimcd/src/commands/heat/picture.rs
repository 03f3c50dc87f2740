//! A disk as rows of cells: reads above, writes below.

use std::fmt::Write as _;

use flimcd_agent::api::{HeatCell, HeatReport};

use crate::format;

/// Rows at most. Each takes two lines in plain characters, one in colours.
const ROWS: usize = 12;
/// Columns of a row's label, which says where it begins.
const LABEL: usize = 10;
/// Levels of heat above cold. Each is twice as hot as the one before.
const LEVELS: usize = 9;
/// Plain characters, cold first.
const PLAIN: [char; LEVELS + 1] = ['.', ':', '-', '~', '=', '+', 'x', '*', '#', '@'];
/// Of the 256 colours, cold first: reads from blue to white, writes from brown to yellow.
const READS: [u8; LEVELS + 1] = [235, 18, 19, 20, 27, 33, 39, 45, 87, 195];
const WRITES: [u8; LEVELS + 1] = [234, 52, 88, 124, 160, 196, 202, 208, 220, 229];

/// What the terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// ASCII.
    Plain,
    /// 256 colours and half blocks.
    Colors,
}

/// Draws pictures of a width.
pub(super) struct Picture {
    columns: usize,
    style: Style,
}

impl Picture {
    /// For a terminal of so many columns.
    pub(super) fn new(width: u16, style: Style) -> Self {
        let columns = usize::from(width).saturating_sub(LABEL + 3).clamp(16, 512);
        Self { columns, style }
    }

    /// How many cells it has at most.
    pub(super) fn cells(&self) -> u32 {
        u32::try_from(self.columns * ROWS).unwrap_or(u32::MAX)
    }

    /// The picture and what it means.
    pub(super) fn draw(&self, report: &HeatReport) -> String {
        let most = |of: fn(&HeatCell) -> f64| report.cells.iter().map(of).fold(0.0, f64::max);
        let (reads, writes) = (most(read), most(written));
        let mut text = String::new();
        for (row, cells) in report.cells.chunks(self.columns).enumerate() {
            let begins = (row * self.columns) as u64 * report.cell_bytes;
            let _ = write!(text, "{:>LABEL$} ", format::bytes(begins));
            match self.style {
                Style::Plain => {
                    plain(
                        &mut text,
                        'r',
                        cells.iter().map(|cell| level(read(cell), reads)),
                    );
                    let _ = write!(text, "{:>LABEL$} ", "");
                    plain(
                        &mut text,
                        'w',
                        cells.iter().map(|cell| level(written(cell), writes)),
                    );
                }
                Style::Colors => colors(&mut text, cells, reads, writes),
            }
        }
        self.explain(&mut text, report, reads, writes);
        text
    }

    fn explain(&self, text: &mut String, report: &HeatReport, reads: f64, writes: f64) {
        let cell = format::bytes(report.cell_bytes);
        let _ = writeln!(text, "\neach cell has {cell}; the hottest:");
        let kinds = [
            ("reads", "above", reads, READS),
            ("writes", "below", writes, WRITES),
        ];
        for (name, place, most, palette) in kinds {
            let _ = write!(text, "  {name:<6} ({place})  ");
            for (level, plain) in PLAIN.into_iter().enumerate() {
                match self.style {
                    Style::Plain => text.push(plain),
                    Style::Colors => {
                        let _ = write!(text, "\x1b[38;5;{}m█", palette[level]);
                    }
                }
            }
            if self.style == Style::Colors {
                text.push_str("\x1b[0m");
            }
            let _ = writeln!(text, "  {}", super::per_second(most));
        }
    }
}

fn read(cell: &HeatCell) -> f64 {
    cell.read_bytes_per_s
}

fn written(cell: &HeatCell) -> f64 {
    cell.written_bytes_per_s
}

/// 0 for cold, `LEVELS` for the hottest, one less for each halving.
fn level(rate: f64, most: f64) -> usize {
    if rate <= 0.0 || most <= 0.0 {
        return 0;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and is bounded"
    )]
    let halvings = (most / rate).log2().round() as usize;
    LEVELS.saturating_sub(halvings).max(1)
}

fn plain(text: &mut String, mark: char, levels: impl Iterator<Item = usize>) {
    text.push(mark);
    text.push(' ');
    text.extend(levels.map(|level| PLAIN[level]));
    text.push('\n');
}

/// One line: the upper half of each cell for reads, the lower for writes.
fn colors(text: &mut String, cells: &[HeatCell], reads: f64, writes: f64) {
    let mut last = None;
    for cell in cells {
        let above = READS[level(read(cell), reads)];
        let below = WRITES[level(written(cell), writes)];
        if last.replace((above, below)) != Some((above, below)) {
            let _ = write!(text, "\x1b[38;5;{above};48;5;{below}m");
        }
        text.push('▀');
    }
    text.push_str("\x1b[0m\n");
}

#[cfg(test)]
mod tests {
    use super::{super::tests::report, *};

    fn drawn(width: u16, style: Style) -> String {
        let picture = Picture::new(width, style);
        picture.draw(&report(picture.cells()))
    }

    #[test]
    fn plain_is_ascii_and_fits() {
        for width in [20, 80, 200] {
            let text = drawn(width, Style::Plain);
            assert!(text.is_ascii(), "{text}");
            let rows = text.lines().take(2 * ROWS);
            assert!(rows.clone().count() == 2 * ROWS, "{text}");
            let longest = rows.map(str::len).max().unwrap();
            assert!(longest <= usize::from(width).max(LABEL + 3 + 16), "{text}");
        }
    }

    #[test]
    fn hot_cells_are_where_they_are_hot() {
        let text = drawn(80, Style::Plain);
        let lines: Vec<_> = text.lines().collect();
        // A quarter of 12 rows: the first cell of the fourth row of reads.
        assert!(lines[6].starts_with("   256 MiB r @."), "{text}");
        assert_eq!(
            text.lines()
                .take(24)
                .filter(|line| line.contains('@'))
                .count(),
            2
        );
        assert!(
            lines[23].ends_with(".@") && lines[23].contains(" w "),
            "{text}"
        );
    }

    #[test]
    fn colours_take_one_line_for_a_row_and_end() {
        let text = drawn(80, Style::Colors);
        let rows: Vec<_> = text.lines().take(ROWS).collect();
        for row in &rows {
            assert_eq!(row.matches('▀').count(), 80 - LABEL - 3, "{row}");
            assert!(row.ends_with("\x1b[0m"), "{row}");
        }
        assert!(
            rows[3].contains(&format!("38;5;{}", READS[LEVELS])),
            "{:?}",
            rows[3]
        );
        assert!(rows[11].contains(&format!("48;5;{}", WRITES[LEVELS])));
    }

    #[test]
    fn levels_halve() {
        assert_eq!(level(0.0, 8.0), 0);
        assert_eq!(level(8.0, 8.0), LEVELS);
        assert_eq!(level(4.0, 8.0), LEVELS - 1);
        assert_eq!(level(1e-9, 8.0), 1, "hardly warm is not cold");
        assert_eq!(level(1.0, 0.0), 0);
    }
}
