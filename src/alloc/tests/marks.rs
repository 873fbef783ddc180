use proptest::prelude::*;

use super::*;

/// Allocates all marks of a layout.
fn drain(layout: MarkLayout) -> (MarkPool, Vec<Mark>) {
    let mut pool = MarkPool::new(layout);
    let mut marks = Vec::new();
    loop {
        match pool.allocate(&node(marks.len())) {
            Ok(mark) => marks.push(mark),
            Err(error) => {
                let refused =
                    AllocError::Exhausted { node: node(marks.len()), capacity: layout.capacity() };
                assert_eq!(error, refused);
                return (pool, marks);
            }
        }
    }
}

fn assert_complete(layout: MarkLayout, marks: &[Mark]) {
    assert_eq!(marks.len(), layout.capacity());
    assert_eq!(marks.iter().collect::<BTreeSet<_>>().len(), marks.len());
    assert!(marks.iter().all(|mark| layout.value(*mark).is_some()));
    let order = |mark: &Mark| (layout.touches_avoided(*mark), *mark);
    assert!(marks.is_sorted_by_key(order), "clear ones first, ascending");
}

#[test]
fn the_default_layout_gives_all_65_536_marks() {
    let (mut pool, marks) = drain(MarkLayout::SEED);
    assert_eq!(marks.len(), 65_536);
    assert_complete(MarkLayout::SEED, &marks);
    let clear = marks.iter().filter(|m| !MarkLayout::SEED.touches_avoided(**m));
    assert_eq!(clear.count(), 512);
    for (n, mark) in marks.iter().enumerate() {
        assert_eq!(pool.allocate(&node(n)), Ok(*mark), "stable on repeat");
        assert_eq!(pool.get(&node(n)), Some(*mark));
    }
    assert_eq!(pool.len(), 65_536);
}

#[test]
fn compact_layouts_give_exactly_what_is_not_set_aside() {
    for (layout, count) in [(MarkLayout::COMPACT, 253), (MarkLayout::COMPACT6, 61)] {
        let (_, marks) = drain(layout);
        assert_eq!(marks.len(), count);
        assert_complete(layout, &marks);
    }
}

#[test]
fn a_release_makes_room_for_exactly_that_mark() {
    let (mut pool, marks) = drain(MarkLayout::COMPACT);
    assert_eq!(pool.release(&node(100)), Ok(marks[100]));
    assert_eq!(pool.get(&node(100)), None);
    assert_eq!(pool.allocate(&node("new")), Ok(marks[100]));
    assert!(matches!(
        pool.allocate(&node("newer")),
        Err(AllocError::Exhausted { capacity: 253, .. })
    ));
}

#[test]
fn a_second_release_is_refused_and_frees_nothing() {
    let mut pool = MarkPool::default();
    let mark = pool.allocate(&node("a")).unwrap();
    assert_eq!(pool.release(&node("a")), Ok(mark));
    assert_eq!(pool.allocate(&node("b")), Ok(mark));
    let unknown = AllocError::Unknown { node: node("a") };
    assert_eq!(pool.release(&node("a")), Err(unknown));
    assert_eq!(pool.get(&node("b")), Some(mark));
    assert_ne!(pool.allocate(&node("c")), Ok(mark));
}

#[test]
fn foreign_marks_are_refused() {
    let layouts = [MarkLayout::SEED, MarkLayout::COMPACT, MarkLayout::COMPACT6];
    for layout in layouts {
        let mut pool = MarkPool::new(layout);
        let good = layout.mark(1).unwrap().get();
        let outside = Mark::new(good | 1);
        for mark in [Mark::new(0), outside, layout.tunnel(), layout.closed()] {
            let foreign = AllocError::Foreign { id: mark };
            assert_eq!(pool.reserve(&node("a"), mark), Err(foreign));
        }
        assert!(pool.is_empty());
    }
}

#[test]
fn nodes_are_listed_by_mark() {
    let mut pool = MarkPool::default();
    let [low, high] = [Mark::new(0x2600_0100), Mark::new(0x2600_0200)];
    pool.reserve(&node("a"), high).unwrap();
    pool.reserve(&node("b"), low).unwrap();
    let listed: Vec<_> = pool.iter().collect();
    assert_eq!(listed, [(&node("b"), low), (&node("a"), high)]);
}

/// A reference model of [`MarkPool`]: simple and slow.
struct Model {
    layout: MarkLayout,
    nodes: BTreeMap<NodeName, Mark>,
}

impl Model {
    fn holder(&self, mark: Mark) -> Option<NodeName> {
        let mut nodes = self.nodes.iter();
        nodes.find(|(_, held)| **held == mark).map(|(node, _)| node.clone())
    }

    fn allocate(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>> {
        if let Some(mark) = self.nodes.get(node) {
            return Ok(*mark);
        }
        let layout = self.layout;
        let free = (0..16).filter_map(|value| layout.mark(value));
        let mark = free
            .filter(|mark| self.holder(*mark).is_none())
            .min_by_key(|mark| (layout.touches_avoided(*mark), *mark))
            .ok_or_else(|| AllocError::Exhausted {
                node: node.clone(),
                capacity: layout.capacity(),
            })?;
        self.nodes.insert(node.clone(), mark);
        Ok(mark)
    }

    fn reserve(&mut self, node: &NodeName, mark: Mark) -> Result<(), AllocError<Mark>> {
        let id = mark;
        let asker = node.clone();
        match (self.holder(mark), self.nodes.get(node)) {
            _ if self.layout.value(mark).is_none() => Err(AllocError::Foreign { id }),
            (Some(holder), _) if holder == *node => Ok(()),
            (Some(holder), _) => Err(AllocError::Taken { id, node: asker, holder }),
            (None, Some(&held)) => Err(AllocError::Holds { node: asker, held, id }),
            (None, None) => {
                self.nodes.insert(asker, mark);
                Ok(())
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u8),
    Reserve(u8, u16),
    Release(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..24_u8).prop_map(Step::Allocate),
        3 => (0..24_u8, 0..18_u16).prop_map(|(node, value)| Step::Reserve(node, value)),
        2 => (0..24_u8).prop_map(Step::Release),
    ]
}

proptest! {
    #[test]
    fn behaves_like_the_model(
        steps in prop::collection::vec(step(), 0..200),
        prefixed in any::<bool>(),
        avoid in 0..16_u32,
    ) {
        let (prefix, mask) = if prefixed { (0x2600_0000, 0xff00_0000) } else { (0, 0) };
        let layout = MarkLayout::new(prefix, mask, 4, 4).unwrap().with_avoid(avoid << 4);
        let mut pool = MarkPool::new(layout);
        let mut model = Model { layout, nodes: BTreeMap::new() };
        for step in steps {
            match step {
                Step::Allocate(n) => {
                    prop_assert_eq!(pool.allocate(&node(n)), model.allocate(&node(n)));
                }
                Step::Reserve(n, value) => {
                    let mark = Mark::new(prefix | u32::from(value) << 4);
                    let expected = model.reserve(&node(n), mark);
                    prop_assert_eq!(pool.reserve(&node(n), mark), expected);
                }
                Step::Release(n) => {
                    let unknown = AllocError::Unknown { node: node(n) };
                    let expected = model.nodes.remove(&node(n)).ok_or(unknown);
                    prop_assert_eq!(pool.release(&node(n)), expected);
                }
            }
            let listed: BTreeMap<_, _> = pool.iter().map(|(n, mark)| (n.clone(), mark)).collect();
            prop_assert_eq!(&listed, &model.nodes);
            prop_assert_eq!(pool.len(), model.nodes.len());
        }
    }
}
